// Vectors of SF words times a matrix: NF groups of PE results, SIMD products in each a cycle.
// The first group reads the vector, which is kept for the others. A result comes 8 enabled cycles after its last words:
// memory, two registers before a product and two behind, groups of lanes, all groups, accumulator.
`default_nettype none
module qc_sum #(parameter N = 1, IB = 8, OB = 8) (input wire [N*IB-1:0] x, output reg signed [OB-1:0] y);
  integer i;
  always @* begin
    y = 0;
    for (i = 0; i < N; i = i + 1) y = y + $signed(x[i*IB +: IB]);
  end
endmodule

module qc_matvec #(parameter PE = 1, SIMD = 1, SF = 1, NF = 1, XB = 8, XS = 1, WB = 8, AB = 24,
                   WEIGHTS = "w.mem", BIAS = "b.mem") (
    input  wire               clk, rst, en,
    input  wire [SIMD*XB-1:0] s_d, input wire s_v, output wire s_r,
    input  wire               k_v, output wire k_r,
    output reg  [PE*AB-1:0]   o_d, output wire o_v);
  localparam XW = XS ? XB : XB + 1, PB = XW + WB;
  localparam D = NF * SF, A = D > 1 ? $clog2(D) : 1, NB = NF > 1 ? $clog2(NF) : 1, SB = SF > 1 ? $clog2(SF) : 1;
  // two stages of additions: groups of RADIX, then the groups
  localparam RADIX = 1 << (($clog2(SIMD) + 1) / 2), GROUPS = (SIMD + RADIX - 1) / RADIX;

  reg [PE*SIMD*WB-1:0] weights [0:D-1];
  reg [PE*AB-1:0]      bias [0:NF-1];
  initial begin
    $readmemh(WEIGHTS, weights);
    $readmemh(BIAS, bias);
  end

  reg [SIMD*XB-1:0] kept [0:SF-1];
  reg [NB-1:0] nf;
  wire [NB-1:0] n6;
  reg [SB-1:0] sf;
  reg [A-1:0]  wa;
  wire first = nf == 0, last = sf == SF - 1;
  // the last step of a group also takes the words that join the group's results
  wire issue = en & (!first | s_v) & (!last | k_v);
  assign s_r = en & first & (!last | k_v);
  assign k_r = issue & last;

  reg [7:1] v, f;
  reg [8:1] l;
  reg [PE*SIMD*WB-1:0] w1, w2, w3;
  reg [SIMD*XB-1:0]    new1, old1, x2, x3;
  reg                  from1;
  reg [PE*SIMD*PB-1:0]   product, settled;
  reg [PE*GROUPS*AB-1:0] part;
  reg [PE*AB-1:0]        total, b7;
  assign o_v = l[8];
  qc_delay #(.W(NB), .N(6)) later (.clk(clk), .en(en), .d(nf), .q(n6));

  always @(posedge clk) begin
    if (issue & first) kept[sf] <= s_d;
    if (en) begin
      w1 <= weights[wa];
      new1 <= s_d;
      old1 <= kept[sf];
      from1 <= first;
      w2 <= w1;
      x2 <= from1 ? new1 : old1;
      w3 <= w2;
      x3 <= x2;
      settled <= product;
      b7 <= bias[n6];
    end
    if (rst) begin
      nf <= 0; sf <= 0; wa <= 0; v <= 0; l <= 0; f <= 0;
    end else if (en) begin
      v <= {v[6:1], issue};
      f <= {f[6:1], sf == 0};
      l <= {l[7:1], issue & last};
      if (issue) begin
        wa <= wa == D - 1 ? 0 : wa + 1'b1;
        sf <= last ? 0 : sf + 1'b1;
        if (last) nf <= nf == NF - 1 ? 0 : nf + 1'b1;
      end
    end
  end

  genvar p, s, g;
  generate
    for (p = 0; p < PE; p = p + 1) begin : result
      for (s = 0; s < SIMD; s = s + 1) begin : lane
        localparam I = p * SIMD + s;
        wire signed [XB:0]   wide = {XS ? x3[s*XB+XB-1] : 1'b0, x3[s*XB +: XB]};
        wire signed [XW-1:0] x = wide[XW-1:0];
        wire signed [WB-1:0] w = w3[I*WB +: WB];
        always @(posedge clk) if (en) product[I*PB +: PB] <= x * w;
      end
      for (g = 0; g < GROUPS; g = g + 1) begin : group
        localparam COUNT = SIMD - g * RADIX < RADIX ? SIMD - g * RADIX : RADIX;
        wire signed [AB-1:0] y;
        qc_sum #(.N(COUNT), .IB(PB), .OB(AB)) add (.x(settled[(p*SIMD+g*RADIX)*PB +: COUNT*PB]), .y(y));
        always @(posedge clk) if (en) part[(p*GROUPS+g)*AB +: AB] <= y;
      end
      wire signed [AB-1:0] all;
      qc_sum #(.N(GROUPS), .IB(AB), .OB(AB)) add (.x(part[p*GROUPS*AB +: GROUPS*AB]), .y(all));
      wire signed [AB-1:0] begun = f[7] ? b7[p*AB +: AB] : o_d[p*AB +: AB];
      always @(posedge clk)
        if (en) begin
          total[p*AB +: AB] <= all;
          if (v[7]) o_d[p*AB +: AB] <= begun + $signed(total[p*AB +: AB]);
        end
    end
  endgenerate
endmodule
`default_nettype wire
