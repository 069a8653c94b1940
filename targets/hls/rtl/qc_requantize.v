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

// (x * m) >> shift in TB bits, 6 enabled cycles later; m is signed.
module qc_scale #(parameter PE = 1, XB = 8, XS = 1, MB = 8, SB = 1, TB = 16, D_M = 1, D_S = 1, IB = 1, M = 0, S = 0,
                  MULTIPLIERS = "m.mem", SHIFTS = "s.mem") (
    input  wire             clk, en,
    input  wire [IB-1:0]    index,
    input  wire [PE*XB-1:0] x,
    output reg  [PE*TB-1:0] t);
  localparam XW = XS ? XB : XB + 1, PB = XW + MB;
  localparam WIDE = PB > TB ? PB : TB;
  reg  [PE*XB-1:0] x1, x2;
  wire [PE*MB-1:0] m1, m2;
  wire [PE*SB-1:0] shift;
  wire [IB-1:0]    i4;
  qc_words #(.W(PE*MB), .D(D_M), .IB(IB), .CONSTANT(M), .FILE(MULTIPLIERS)) ms (.clk(clk), .en(en), .index(index), .q(m1));
  qc_delay #(.W(IB), .N(4)) later (.clk(clk), .en(en), .d(index), .q(i4));
  qc_words #(.W(PE*SB), .D(D_S), .IB(IB), .CONSTANT(S), .FILE(SHIFTS)) ss (.clk(clk), .en(en), .index(i4), .q(shift));
  always @(posedge clk)
    if (en) begin
      x1 <= x;
      x2 <= x1;
    end
  generate
    if (D_M == 1) begin : same
      assign m2 = m1;
    end else begin : each
      qc_delay #(.W(PE*MB), .N(1)) settled (.clk(clk), .en(en), .d(m1), .q(m2));
    end
  endgenerate
  genvar p;
  generate
    for (p = 0; p < PE; p = p + 1) begin : lane
      wire signed [XB:0]   wide = {XS ? x2[p*XB+XB-1] : 1'b0, x2[p*XB +: XB]};
      wire signed [PB-1:0] p5;
      qc_multiply #(.A(XW), .B(MB)) multiply (.clk(clk), .en(en), .a(wide[XW-1:0]), .b(m2[p*MB +: MB]), .y(p5));
      wire signed [WIDE-1:0] product = p5;
      wire signed [WIDE-1:0] moved = product >>> shift[p*SB +: SB];
      always @(posedge clk) if (en) t[p*TB +: TB] <= moved[TB-1:0];
    end
  endgenerate
endmodule

// clamp(((sum of terms + offset) >> shift) + ZERO): terms come 6 enabled cycles after `index` and `v`, the result 9.
module qc_finish #(parameter PE = 1, TERMS = 1, TB = 16, SB = 1, OB = 8, ZERO = 0, LO = 0, HI = 127,
                   D_O = 1, D_S = 1, IB = 1, O = 0, S = 0, OFFSETS = "o.mem", SHIFTS = "s.mem") (
    input  wire                   clk, rst,
    output wire                   en,
    input  wire [IB-1:0]          index,
    input  wire                   v,
    input  wire [TERMS*PE*TB-1:0] t,
    output reg  [PE*OB-1:0]       m_d, output wire m_v, input wire m_r);
  localparam YB = (TB > OB ? TB : OB) + 2;
  localparam signed [YB-1:0] LEAST = LO - ZERO, MOST = HI - ZERO;
  localparam [OB-1:0] Z = ZERO, UNDER = LO, OVER = HI;
  reg [9:1] valid;
  assign en = !valid[9] | m_r;
  assign m_v = valid[9];
  always @(posedge clk)
    if (rst) valid <= 0;
    else if (en) valid <= {valid[8:1], v};

  wire [IB-1:0]    i5, i6;
  wire [PE*TB-1:0] offset;
  wire [PE*SB-1:0] shift;
  qc_delay #(.W(IB), .N(5)) later (.clk(clk), .en(en), .d(index), .q(i5));
  qc_delay #(.W(IB), .N(1)) last (.clk(clk), .en(en), .d(i5), .q(i6));
  qc_words #(.W(PE*TB), .D(D_O), .IB(IB), .CONSTANT(O), .FILE(OFFSETS)) os (.clk(clk), .en(en), .index(i5), .q(offset));
  qc_words #(.W(PE*SB), .D(D_S), .IB(IB), .CONSTANT(S), .FILE(SHIFTS)) ss (.clk(clk), .en(en), .index(i6), .q(shift));
  genvar p, k;
  generate
    for (p = 0; p < PE; p = p + 1) begin : lane
      wire [(TERMS+1)*TB-1:0] all;
      for (k = 0; k < TERMS; k = k + 1) begin : term
        assign all[k*TB +: TB] = t[(k*PE+p)*TB +: TB];
      end
      assign all[TERMS*TB +: TB] = offset[p*TB +: TB];
      wire signed [TB-1:0] sum;
      reg  signed [TB-1:0] s7, s8;
      qc_sum #(.N(TERMS + 1), .IB(TB), .OB(TB)) add (.x(all), .y(sum));
      wire signed [YB-1:0] y = s8;
      wire [OB-1:0]        low = y[OB-1:0] + Z;
      always @(posedge clk)
        if (en) begin
          s7 <= sum;
          s8 <= s7 >>> shift[p*SB +: SB];
          m_d[p*OB +: OB] <= y < LEAST ? UNDER : y > MOST ? OVER : low;
        end
    end
  endgenerate
endmodule
`default_nettype wire
