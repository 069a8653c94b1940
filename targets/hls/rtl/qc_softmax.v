// Softmax over rows of C codes: the row is read, its exponentials are looked up and added, the sum is inverted by
// Newton's iteration, the quotients are written. Nothing overlaps, and every row takes as long as any other.
`default_nettype none
module qc_softmax #(parameter C = 10, XB = 8, XS = 1, OB = 8, LINE = 0, SLOPE = 0, FILE = "t.mem") (
    input  wire          clk, rst,
    input  wire [XB-1:0] s_d, input wire s_v, output wire s_r,
    output reg  [OB-1:0] m_d, output wire m_v, input wire m_r);
  localparam NB = $clog2(C + 1);
  localparam [2:0] LOAD = 0, ADD = 1, LEVEL = 2, INVERT = 3, WRITE = 4;
  localparam [5:0] OUT = OB;

  reg [31:0]   table_ [0:(1<<XB)-1];
  reg [XB-1:0] codes [0:C-1];
  reg [31:0]   exps [0:C-1];
  initial $readmemh(FILE, table_);

  reg [2:0]    state;
  reg [NB-1:0] n, w;
  reg [5:0]    k;
  reg signed [XB:0] top;
  wire signed [XB:0] x = {XS ? s_d[XB-1] : 1'b0, s_d};
  wire last = n == C - 1;
  assign s_r = state == LOAD;

  // the exponentials, and their sum
  reg [XB-1:0] code1, below2;
  reg [31:0]   e3, sum;
  reg [3:1]    a;
  wire signed [XB:0] wide1 = {XS ? code1[XB-1] : 1'b0, code1};
  wire signed [XB:0] under = top - wide1;

  // one multiplier makes all the products of the iteration
  reg signed [33:0]  ma, mb, r;
  wire signed [67:0] mp;
  reg [5:0]          high;
  qc_multiply #(.A(34), .B(34)) step (.clk(clk), .en(1'b1), .a(ma), .b(mb), .y(mp));
  wire signed [33:0] norm = {2'b00, sum};
  wire signed [33:0] by31 = mp >>> 31, by30 = mp >>> 30;

  reg [31:0] e1;
  wire signed [66:0] p4;
  reg signed [66:0]  half, p5;
  reg [OB:0]         y6;
  reg [7:1]  v;
  reg [5:0]  shift;
  wire       en = !v[7] | m_r;
  wire       issue = en && state == WRITE;
  // a quotient is a code less the lowest one: 0 to 2**OB
  localparam [OB-1:0] LEAST = 1 << (OB - 1);
  assign m_v = v[7];
  qc_multiply #(.A(33), .B(34)) quotient (.clk(clk), .en(en), .a({1'b0, e1}), .b(r), .y(p4));

  always @(posedge clk) begin
    if (s_v & s_r) codes[n] <= s_d;
    code1 <= codes[n];
    below2 <= under[XB-1:0];
    e3 <= table_[below2];
    if (a[3]) exps[w] <= e3;
    if (en) begin
      e1 <= exps[n];
      p5 <= p4 + half;
      y6 <= p5 >>> shift;
      m_d <= (y6[OB] ? {OB{1'b1}} : y6[OB-1:0]) + LEAST;
    end
    shift <= 6'd31 + high - OUT;
    half <= 67'sd1 <<< (shift - 6'd1);
    if (rst) begin
      state <= LOAD; n <= 0; w <= 0; k <= 0; a <= 0; v <= 0;
    end else begin
      a <= {a[2:1], state == ADD && k == 0};
      if (en) v <= {v[6:1], issue};
      if (a[3]) begin
        w <= w == C - 1 ? 0 : w + 1'b1;
        sum <= sum + e3;
      end
      case (state)
        LOAD:
          if (s_v) begin
            if (n == 0 || x > top) top <= x;
            n <= last ? 0 : n + 1'b1;
            sum <= 0;
            if (last) state <= ADD;
          end
        ADD:
          if (k == 0) begin
            n <= last ? 0 : n + 1'b1;
            if (last) k <= 1;
          end else if (k != 4) k <= k + 1'b1;
          else if (v[5:1] == 0) begin
            // no quotient of the row before needs its shift any more
            k <= 0;
            high <= 30;
            state <= LEVEL;
          end
        LEVEL: begin
          // the sum's highest bit moves to bit 30
          if (!sum[30]) begin
            sum <= sum << 1;
            high <= high - 1'b1;
          end
          k <= k == 30 ? 0 : k + 1'b1;
          if (k == 30) state <= INVERT;
        end
        INVERT: begin
          // a product can be used 4 cycles after its operands are set: the line, then error and step three times
          k <= k == 31 ? 0 : k + 1'b1;
          if (k == 31) state <= WRITE;
          if (k == 0) begin ma <= norm; mb <= SLOPE; end
          else if (k == 4) r <= LINE - by31;
          else if (k == 5 || k == 14 || k == 23) begin ma <= norm; mb <= r; end
          else if (k == 9 || k == 18 || k == 27) begin ma <= r; mb <= 34'sh080000000 - by30; end
          else if (k == 13 || k == 22 || k == 31) r <= r + by31;
        end
        default:
          if (issue) begin
            n <= last ? 0 : n + 1'b1;
            if (last) state <= LOAD;
          end
      endcase
    end
  end
endmodule
`default_nettype wire
