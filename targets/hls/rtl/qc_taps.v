// Units that reduce each channel's TAPS words to one, LANES channels at once; a pixel has F groups of channels.
`default_nettype none

// Taps times weights, plus bias: a result comes 6 enabled cycles after its last word, as with qc_matvec's registers.
module qc_depthwise #(parameter LANES = 1, TAPS = 9, F = 1, XB = 8, XS = 1, WB = 8, AB = 24,
                      WEIGHTS = "w.mem", BIAS = "b.mem") (
    input  wire                clk, rst, en,
    input  wire [LANES*XB-1:0] s_d, input wire s_v, output wire s_r,
    input  wire                k_v, output wire k_r,
    output reg  [LANES*AB-1:0] o_d, output wire o_v);
  localparam XW = XS ? XB : XB + 1, PB = XW + WB;
  localparam D = F * TAPS, A = D > 1 ? $clog2(D) : 1, NB = F > 1 ? $clog2(F) : 1, TB = TAPS > 1 ? $clog2(TAPS) : 1;
  reg [LANES*WB-1:0] weights [0:D-1];
  reg [LANES*AB-1:0] bias [0:F-1];
  initial begin
    $readmemh(WEIGHTS, weights);
    $readmemh(BIAS, bias);
  end

  reg [A-1:0]  wa;
  reg [TB-1:0] tap;
  reg [NB-1:0] nf;
  wire [NB-1:0] n4;
  wire last = tap == TAPS - 1;
  wire issue = en & s_v & (!last | k_v);
  assign s_r = en & (!last | k_v);
  assign k_r = issue & last;

  reg [5:1] v, f;
  reg [6:1] l;
  reg [LANES*WB-1:0] w1, w2, w3;
  reg [LANES*XB-1:0] x1, x2, x3;
  reg [LANES*PB-1:0] product, settled;
  reg [LANES*AB-1:0] b5;
  assign o_v = l[6];
  qc_delay #(.W(NB), .N(4)) later (.clk(clk), .en(en), .d(nf), .q(n4));

  always @(posedge clk) begin
    if (en) begin
      w1 <= weights[wa];
      x1 <= s_d;
      w2 <= w1;
      x2 <= x1;
      w3 <= w2;
      x3 <= x2;
      settled <= product;
      b5 <= bias[n4];
    end
    if (rst) begin
      nf <= 0; tap <= 0; wa <= 0; v <= 0; l <= 0; f <= 0;
    end else if (en) begin
      v <= {v[4:1], issue};
      f <= {f[4:1], tap == 0};
      l <= {l[5:1], issue & last};
      if (issue) begin
        wa <= wa == D - 1 ? 0 : wa + 1'b1;
        tap <= last ? 0 : tap + 1'b1;
        if (last) nf <= nf == F - 1 ? 0 : nf + 1'b1;
      end
    end
  end

  genvar p;
  generate
    for (p = 0; p < LANES; p = p + 1) begin : lane
      wire signed [XB:0]   wide = {XS ? x3[p*XB+XB-1] : 1'b0, x3[p*XB +: XB]};
      wire signed [XW-1:0] x = wide[XW-1:0];
      wire signed [WB-1:0] w = w3[p*WB +: WB];
      wire signed [AB-1:0] begun = f[5] ? b5[p*AB +: AB] : o_d[p*AB +: AB];
      always @(posedge clk)
        if (en) begin
          product[p*PB +: PB] <= x * w;
          if (v[5]) o_d[p*AB +: AB] <= begun + $signed(settled[p*PB +: PB]);
        end
    end
  endgenerate
endmodule

// The sum of x - ZERO: a result comes 2 enabled cycles after its last word.
module qc_sum_pool #(parameter LANES = 1, TAPS = 4, XB = 8, XS = 1, ZERO = 0, AB = 16) (
    input  wire                clk, rst, en,
    input  wire [LANES*XB-1:0] s_d, input wire s_v, output wire s_r,
    input  wire                k_v, output wire k_r,
    output reg  [LANES*AB-1:0] o_d, output wire o_v);
  localparam TB = TAPS > 1 ? $clog2(TAPS) : 1;
  localparam signed [XB+1:0] BELOW = ZERO;
  reg [TB-1:0] tap;
  wire last = tap == TAPS - 1;
  wire issue = en & s_v & (!last | k_v);
  assign s_r = en & (!last | k_v);
  assign k_r = issue & last;

  reg       v1, f1;
  reg [2:1] l;
  reg [LANES*(XB+2)-1:0] x1;
  assign o_v = l[2];
  always @(posedge clk)
    if (rst) begin
      tap <= 0; v1 <= 0; l <= 0; f1 <= 0;
    end else if (en) begin
      v1 <= issue;
      f1 <= tap == 0;
      l <= {l[1], issue & last};
      if (issue) tap <= last ? 0 : tap + 1'b1;
    end

  genvar p;
  generate
    for (p = 0; p < LANES; p = p + 1) begin : lane
      wire signed [XB:0]   x = {XS ? s_d[p*XB+XB-1] : 1'b0, s_d[p*XB +: XB]};
      wire signed [AB-1:0] begun = f1 ? {AB{1'b0}} : o_d[p*AB +: AB];
      always @(posedge clk)
        if (en) begin
          x1[p*(XB+2) +: XB+2] <= x - BELOW;
          if (v1) o_d[p*AB +: AB] <= begun + $signed(x1[p*(XB+2) +: XB+2]);
        end
    end
  endgenerate
endmodule

// The sum of x - ZERO over PIXELS pixels of F words: a result comes 2 enabled cycles after its last word.
module qc_global_sum #(parameter LANES = 1, PIXELS = 4, F = 1, XB = 8, XS = 1, ZERO = 0, AB = 16) (
    input  wire                clk, rst, en,
    input  wire [LANES*XB-1:0] s_d, input wire s_v, output wire s_r,
    input  wire                k_v, output wire k_r,
    output reg  [LANES*AB-1:0] o_d, output wire o_v);
  localparam NB = F > 1 ? $clog2(F) : 1, CB = PIXELS > 1 ? $clog2(PIXELS) : 1;
  localparam signed [XB+1:0] BELOW = ZERO;
  reg [LANES*AB-1:0] sums [0:F-1];
  reg [NB-1:0] nf, n1;
  reg [CB-1:0] pixel;
  wire last = pixel == PIXELS - 1;
  wire issue = en & s_v & (!last | k_v);
  assign s_r = en & (!last | k_v);
  assign k_r = issue & last;

  reg       v1, f1;
  reg [2:1] l;
  reg [LANES*(XB+2)-1:0] x1;
  wire [LANES*AB-1:0] old = sums[n1];
  wire [LANES*AB-1:0] sum;
  assign o_v = l[2];
  always @(posedge clk) begin
    if (en & v1) sums[n1] <= sum;
    if (en) begin
      o_d <= sum;
      n1 <= nf;
    end
    if (rst) begin
      nf <= 0; pixel <= 0; v1 <= 0; l <= 0; f1 <= 0;
    end else if (en) begin
      v1 <= issue;
      f1 <= pixel == 0;
      l <= {l[1], issue & last};
      if (issue) begin
        nf <= nf == F - 1 ? 0 : nf + 1'b1;
        if (nf == F - 1) pixel <= last ? 0 : pixel + 1'b1;
      end
    end
  end

  genvar p;
  generate
    for (p = 0; p < LANES; p = p + 1) begin : lane
      wire signed [XB:0]   x = {XS ? s_d[p*XB+XB-1] : 1'b0, s_d[p*XB +: XB]};
      wire signed [AB-1:0] begun = f1 ? {AB{1'b0}} : old[p*AB +: AB];
      assign sum[p*AB +: AB] = begun + $signed(x1[p*(XB+2) +: XB+2]);
      always @(posedge clk) if (en) x1[p*(XB+2) +: XB+2] <= x - BELOW;
    end
  endgenerate
endmodule

// The largest tap: a result comes 2 enabled cycles after its last word.
module qc_max_pool #(parameter LANES = 1, TAPS = 4, XB = 8, XS = 1) (
    input  wire                clk, rst,
    input  wire [LANES*XB-1:0] s_d, input wire s_v, output wire s_r,
    output reg  [LANES*XB-1:0] m_d, output wire m_v, input wire m_r);
  localparam TB = TAPS > 1 ? $clog2(TAPS) : 1;
  reg [TB-1:0] tap;
  wire last = tap == TAPS - 1;
  reg       v1, f1;
  reg [2:1] l;
  reg [LANES*XB-1:0] x1;
  wire en = !l[2] | m_r;
  wire issue = en & s_v;
  assign s_r = en;
  assign m_v = l[2];
  always @(posedge clk) begin
    if (en) x1 <= s_d;
    if (rst) begin
      tap <= 0; v1 <= 0; l <= 0; f1 <= 0;
    end else if (en) begin
      v1 <= issue;
      f1 <= tap == 0;
      l <= {l[1], issue & last};
      if (issue) tap <= last ? 0 : tap + 1'b1;
    end
  end

  genvar p;
  generate
    for (p = 0; p < LANES; p = p + 1) begin : lane
      wire signed [XB:0] x = {XS ? x1[p*XB+XB-1] : 1'b0, x1[p*XB +: XB]};
      wire signed [XB:0] most = {XS ? m_d[p*XB+XB-1] : 1'b0, m_d[p*XB +: XB]};
      always @(posedge clk) if (en & v1 & (f1 | x > most)) m_d[p*XB +: XB] <= x1[p*XB +: XB];
    end
  endgenerate
endmodule
`default_nettype wire
