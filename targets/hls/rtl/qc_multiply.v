// Products of any width. A multiplier of the device takes QC_WIDE x 18 signed bits: 25 x 18 a DSP48E1 of a 7 series
// part, 18 x 18 a MULT18X18D of an ECP5, for which QC_WIDE is set to 18.
`ifndef QC_WIDE
`define QC_WIDE 25
`endif
`default_nettype none

// y = a * b, signed, 3 enabled cycles later: wide operands are cut, every pair of pieces has a multiplier, and the
// products are added. All pieces but the highest are unsigned and one bit shorter. Products are registered twice: in a
// DSP48E1, or because the way back from a multiplier may be as long as the product takes. A highest piece of NARROW bits
// or fewer is not worth a multiplier: its bits choose among copies of the other operand.
module qc_multiply #(parameter A = 18, B = 18) (
    input wire clk, en, input wire [A-1:0] a, input wire [B-1:0] b, output reg [A+B-1:0] y);
  // how many pieces of either kind an operand has; the longer ones go where that takes fewer products
  localparam W = `QC_WIDE;
  localparam A_W = A <= W ? 1 : (A + W - 3) / (W - 1), A_18 = A <= 18 ? 1 : (A + 15) / 17;
  localparam B_W = B <= W ? 1 : (B + W - 3) / (W - 1), B_18 = B <= 18 ? 1 : (B + 15) / 17;
  localparam SWAP = A_18 * B_W < A_W * B_18;
  localparam MA = SWAP ? 18 : W, MB = SWAP ? W : 18;
  localparam NARROW = 6;
  localparam NA = SWAP ? A_18 : A_W, NB = SWAP ? B_W : B_18, N = NA * NB;

  wire [N*(A+B)-1:0] terms;
  wire [A+B-1:0]     sum;
  genvar i, j, k;
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
        reg signed [WA+WB-1:0] product, settled;
        localparam A_FEW = i > 0 && i == NA - 1 && WA <= NARROW, B_FEW = j > 0 && j == NB - 1 && WB <= NARROW;
        if (A_FEW || B_FEW) begin : narrow
          localparam FEW = A_FEW ? WA : WB;
          wire [FEW-1:0]          digits = A_FEW ? pa : pb;
          wire signed [WA+WB-1:0] wide = A_FEW ? pb : pa;
          wire [FEW*(WA+WB)-1:0]  copies;
          wire signed [WA+WB-1:0] all;
          for (k = 0; k < FEW; k = k + 1) begin : digit
            // the highest bit of a signed number counts down
            assign copies[k*(WA+WB) +: WA+WB] = !digits[k] ? {WA+WB{1'b0}} : k == FEW - 1 ? -(wide <<< k) : wide <<< k;
          end
          qc_sum #(.N(FEW), .IB(WA+WB), .OB(WA+WB)) add (.x(copies), .y(all));
          always @(posedge clk) if (en) product <= all;
        end else begin : block
          always @(posedge clk) if (en) product <= pa * pb;
        end
        always @(posedge clk) if (en) settled <= product;
        wire signed [A+B-1:0] term = settled;
        assign terms[(i*NB+j)*(A+B) +: A+B] = term << (i * (MA - 1) + j * (MB - 1));
      end
    end
  endgenerate
  qc_sum #(.N(N), .IB(A+B), .OB(A+B)) add (.x(terms), .y(sum));
  always @(posedge clk) if (en) y <= sum;
endmodule
`default_nettype wire
