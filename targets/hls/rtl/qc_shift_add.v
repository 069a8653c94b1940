// (x * m) >> shift in TB bits without a product, 6 enabled cycles later as qc_scale: m is a sum of COPIES powers of two.
// `position` and `sign` are of the word whose index came a cycle ago; a sign is 1, -1 or, for no copy, 0.
`default_nettype none

module qc_shift_add #(parameter PE = 1, XB = 8, XS = 1, PB = 16, COPIES = 2, KB = 3, SB = 1, TB = 16, D_S = 1, IB = 1,
                      S = 0, SHIFTS = "s.mem") (
    input  wire                    clk, en,
    input  wire [IB-1:0]           index,
    input  wire [COPIES*PE*KB-1:0] position,
    input  wire [COPIES*PE*2-1:0]  sign,
    input  wire [PE*XB-1:0]        x,
    output reg  [PE*TB-1:0]        t);
  localparam XW = XS ? XB : XB + 1;
  localparam WIDE = PB > TB ? PB : TB;
  reg  [PE*XB-1:0] x1;
  wire [PE*SB-1:0] shift;
  wire [IB-1:0]    i4;
  qc_delay #(.W(IB), .N(4)) later (.clk(clk), .en(en), .d(index), .q(i4));
  qc_words #(.W(PE*SB), .D(D_S), .IB(IB), .CONSTANT(S), .FILE(SHIFTS)) ss (.clk(clk), .en(en), .index(i4), .q(shift));
  always @(posedge clk) if (en) x1 <= x;
  genvar p, k;
  generate
    for (p = 0; p < PE; p = p + 1) begin : lane
      wire signed [XB:0]      extended = {XS ? x1[p*XB+XB-1] : 1'b0, x1[p*XB +: XB]};
      wire signed [XW-1:0]    a = extended[XW-1:0];
      wire signed [PB-1:0]    widened = a;
      reg  [COPIES*PB-1:0]    c3;
      wire signed [PB-1:0]    sum;
      reg  signed [PB-1:0]    p4, p5;
      for (k = 0; k < COPIES; k = k + 1) begin : copy
        reg signed [PB-1:0] c2;
        reg [1:0]           s2;
        always @(posedge clk)
          if (en) begin
            c2 <= widened <<< position[(k*PE+p)*KB +: KB];
            s2 <= sign[(k*PE+p)*2 +: 2];
            c3[k*PB +: PB] <= s2 == 0 ? {PB{1'b0}} : s2[1] ? -c2 : c2;
          end
      end
      qc_sum #(.N(COPIES), .IB(PB), .OB(PB)) add (.x(c3), .y(sum));
      wire signed [WIDE-1:0] product = p5;
      wire signed [WIDE-1:0] moved = product >>> shift[p*SB +: SB];
      always @(posedge clk)
        if (en) begin
          p4 <= sum;
          p5 <= p4;
          t[p*TB +: TB] <= moved[TB-1:0];
        end
    end
  endgenerate
endmodule
`default_nettype wire
