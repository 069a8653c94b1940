// Products of any width. A multiplier of the device takes QC_WIDE x 18 signed bits: 25 x 18 a DSP48E1 of a 7 series
// part, 18 x 18 a MULT18X18D of an ECP5, for which QC_WIDE is set to 18.
`ifndef QC_WIDE
`define QC_WIDE 25
`endif
`default_nettype none

// y = a * b, signed, 2 enabled cycles later: wide operands are cut, every pair of pieces has a multiplier and a register,
// and the products are added. All pieces but the highest are unsigned and one bit shorter.
module qc_multiply #(parameter A = 18, B = 18) (
    input wire clk, en, input wire [A-1:0] a, input wire [B-1:0] b, output reg [A+B-1:0] y);
  function integer pieces(input integer width, input integer most);
    pieces = width <= most ? 1 : (width + most - 3) / (most - 1);
  endfunction
  // the longer pieces are those of the operand that needs fewer products so
  localparam SWAP = pieces(A, 18) * pieces(B, `QC_WIDE) < pieces(A, `QC_WIDE) * pieces(B, 18);
  localparam MA = SWAP ? 18 : `QC_WIDE, MB = SWAP ? `QC_WIDE : 18;
  localparam NA = pieces(A, MA), NB = pieces(B, MB), N = NA * NB;

  wire [N*(A+B)-1:0] terms;
  wire [A+B-1:0]     sum;
  genvar i, j;
  generate
    for (i = 0; i < NA; i = i + 1) begin : high
      localparam WA = i == NA - 1 ? A - i * (MA - 1) : MA;
      wire signed [WA-1:0] pa;
      if (i == NA - 1) assign pa = a[A-1 -: WA];
      else assign pa = {1'b0, a[i*(MA-1) +: MA-1]};
      for (j = 0; j < NB; j = j + 1) begin : low
        localparam WB = j == NB - 1 ? B - j * (MB - 1) : MB;
        wire signed [WB-1:0] pb;
        if (j == NB - 1) assign pb = b[B-1 -: WB];
        else assign pb = {1'b0, b[j*(MB-1) +: MB-1]};
        reg signed [WA+WB-1:0] product;
        always @(posedge clk) if (en) product <= pa * pb;
        wire signed [A+B-1:0] term = product;
        assign terms[(i*NB+j)*(A+B) +: A+B] = term << (i * (MA - 1) + j * (MB - 1));
      end
    end
  endgenerate
  qc_sum #(.N(N), .IB(A+B), .OB(A+B)) add (.x(terms), .y(sum));
  always @(posedge clk) if (en) y <= sum;
endmodule
`default_nettype wire
