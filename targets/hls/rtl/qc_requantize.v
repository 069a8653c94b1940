// Requantization of PE results at once: terms that are multiplied and shifted, their sum, one shift and a clamp.
// Parameters that differ from word to word lie in memories and are read by `index`; a memory of one word is a constant.
`default_nettype none

// W bits, N enabled cycles later.
module qc_delay #(parameter W = 1, N = 1) (input wire clk, en, input wire [W-1:0] d, output wire [W-1:0] q);
  reg [N*W-1:0] line;
  assign q = line[N*W-1 -: W];
  generate
    if (N == 1) begin : one
      always @(posedge clk) if (en) line <= d;
    end else begin : more
      always @(posedge clk) if (en) line <= {line[(N-1)*W-1:0], d};
    end
  endgenerate
endmodule

// Which word of parameters a result needs: it moves on after every INNER results.
module qc_index #(parameter INNER = 1, COUNT = 1, IB = 1) (input wire clk, rst, step, output reg [IB-1:0] index);
  localparam NB = INNER > 1 ? $clog2(INNER) : 1;
  reg [NB-1:0] n;
  always @(posedge clk)
    if (rst) begin
      n <= 0;
      index <= 0;
    end else if (step) begin
      n <= n == INNER - 1 ? 0 : n + 1'b1;
      if (n == INNER - 1) index <= index == COUNT - 1 ? 0 : index + 1'b1;
    end
endmodule

// A word of parameters, one enabled cycle after its index.
module qc_words #(parameter W = 8, D = 1, IB = 1, CONSTANT = 0, FILE = "p.mem") (
    input wire clk, en, input wire [IB-1:0] index, output wire [W-1:0] q);
  generate
    if (D == 1) begin : same
      assign q = CONSTANT;
    end else begin : each
      reg [W-1:0] mem [0:D-1], word;
      initial $readmemh(FILE, mem);
      always @(posedge clk) if (en) word <= mem[index];
      assign q = word;
    end
  endgenerate
endmodule

// (x * m) >> shift in TB bits, 4 enabled cycles later; m is signed.
module qc_scale #(parameter PE = 1, XB = 8, XS = 1, MB = 8, SB = 1, TB = 16, D_M = 1, D_S = 1, IB = 1, M = 0, S = 0,
                  MULTIPLIERS = "m.mem", SHIFTS = "s.mem") (
    input  wire             clk, en,
    input  wire [IB-1:0]    index,
    input  wire [PE*XB-1:0] x,
    output reg  [PE*TB-1:0] t);
  localparam XW = XS ? XB : XB + 1, PB = XW + MB;
  localparam WIDE = PB > TB ? PB : TB;
  reg  [PE*XB-1:0] x1;
  wire [PE*MB-1:0] m;
  wire [PE*SB-1:0] shift;
  wire [IB-1:0]    i2;
  qc_words #(.W(PE*MB), .D(D_M), .IB(IB), .CONSTANT(M), .FILE(MULTIPLIERS)) ms (.clk(clk), .en(en), .index(index), .q(m));
  qc_delay #(.W(IB), .N(2)) later (.clk(clk), .en(en), .d(index), .q(i2));
  qc_words #(.W(PE*SB), .D(D_S), .IB(IB), .CONSTANT(S), .FILE(SHIFTS)) ss (.clk(clk), .en(en), .index(i2), .q(shift));
  always @(posedge clk) if (en) x1 <= x;
  genvar p;
  generate
    for (p = 0; p < PE; p = p + 1) begin : lane
      wire signed [XB:0]   wide = {XS ? x1[p*XB+XB-1] : 1'b0, x1[p*XB +: XB]};
      wire signed [PB-1:0] p3;
      qc_multiply #(.A(XW), .B(MB)) multiply (.clk(clk), .en(en), .a(wide[XW-1:0]), .b(m[p*MB +: MB]), .y(p3));
      wire signed [WIDE-1:0] product = p3;
      wire signed [WIDE-1:0] moved = product >>> shift[p*SB +: SB];
      always @(posedge clk) if (en) t[p*TB +: TB] <= moved[TB-1:0];
    end
  endgenerate
endmodule

// clamp(((sum of terms + offset) >> shift) + ZERO): terms come 4 enabled cycles after `index` and `v`, the result 7.
module qc_finish #(parameter PE = 1, TERMS = 1, TB = 16, SB = 1, OB = 8, ZERO = 0, LO = 0, HI = 127,
                   D_O = 1, D_S = 1, IB = 1, O = 0, S = 0, OFFSETS = "o.mem", SHIFTS = "s.mem") (
    input  wire                   clk, rst,
    output wire                   en,
    input  wire [IB-1:0]          index,
    input  wire                   v,
    input  wire [TERMS*PE*TB-1:0] t,
    output reg  [PE*OB-1:0]       m_d, output wire m_v, input wire m_r);
  localparam YB = (TB > OB ? TB : OB) + 2;
  localparam signed [YB-1:0] Z = ZERO, LEAST = LO, MOST = HI;
  reg [7:1] valid;
  assign en = !valid[7] | m_r;
  assign m_v = valid[7];
  always @(posedge clk)
    if (rst) valid <= 0;
    else if (en) valid <= {valid[6:1], v};

  wire [IB-1:0]    i3, i4;
  wire [PE*TB-1:0] offset;
  wire [PE*SB-1:0] shift;
  qc_delay #(.W(IB), .N(3)) later (.clk(clk), .en(en), .d(index), .q(i3));
  qc_delay #(.W(IB), .N(1)) last (.clk(clk), .en(en), .d(i3), .q(i4));
  qc_words #(.W(PE*TB), .D(D_O), .IB(IB), .CONSTANT(O), .FILE(OFFSETS)) os (.clk(clk), .en(en), .index(i3), .q(offset));
  qc_words #(.W(PE*SB), .D(D_S), .IB(IB), .CONSTANT(S), .FILE(SHIFTS)) ss (.clk(clk), .en(en), .index(i4), .q(shift));
  genvar p, k;
  generate
    for (p = 0; p < PE; p = p + 1) begin : lane
      wire [(TERMS+1)*TB-1:0] all;
      for (k = 0; k < TERMS; k = k + 1) begin : term
        assign all[k*TB +: TB] = t[(k*PE+p)*TB +: TB];
      end
      assign all[TERMS*TB +: TB] = offset[p*TB +: TB];
      wire signed [TB-1:0] sum;
      reg  signed [TB-1:0] s5, s6;
      qc_sum #(.N(TERMS + 1), .IB(TB), .OB(TB)) add (.x(all), .y(sum));
      wire signed [YB-1:0] y = $signed({{(YB-TB){s6[TB-1]}}, s6}) + Z;
      wire signed [YB-1:0] clamped = y < LEAST ? LEAST : y > MOST ? MOST : y;
      always @(posedge clk)
        if (en) begin
          s5 <= sum;
          s6 <= s5 >>> shift[p*SB +: SB];
          m_d[p*OB +: OB] <= clamped[OB-1:0];
        end
    end
  endgenerate
endmodule
`default_nettype wire
