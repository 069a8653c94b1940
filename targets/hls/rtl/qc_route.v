// Units that move words and change none.
`default_nettype none

// Every word to all N readers; each takes it when it can, the word is gone when all have.
module qc_fork #(parameter N = 2) (
    input wire clk, rst, input wire s_v, output wire s_r, output wire [N-1:0] m_v, input wire [N-1:0] m_r);
  reg [N-1:0] done;
  wire [N-1:0] served = done | m_r;
  assign m_v = {N{s_v}} & ~done;
  assign s_r = &served;
  always @(posedge clk)
    if (rst) done <= 0;
    else if (s_v) done <= s_r ? {N{1'b0}} : served;
endmodule

// N words side by side in one; it comes a cycle after the last.
module qc_widen #(parameter W = 8, N = 2) (
    input  wire           clk, rst,
    input  wire [W-1:0]   s_d, input wire s_v, output wire s_r,
    output reg  [N*W-1:0] m_d, output reg m_v, input wire m_r);
  localparam C = $clog2(N);
  reg [C-1:0]       n;
  reg [(N-1)*W-1:0] held;
  wire last = n == N - 1, en = !m_v | m_r;
  assign s_r = en;
  generate
    if (N == 2) begin : two
      always @(posedge clk) if (s_v & en) held <= s_d;
    end else begin : more
      always @(posedge clk) if (s_v & en) held <= {s_d, held[(N-1)*W-1:W]};
    end
  endgenerate
  always @(posedge clk) begin
    if (s_v & en & last) m_d <= {s_d, held};
    if (rst) begin
      n <= 0;
      m_v <= 0;
    end else if (en) begin
      m_v <= s_v & last;
      if (s_v) n <= last ? 0 : n + 1'b1;
    end
  end
endmodule

// One word cut into N, from the lowest bits up; the next is taken while the last piece goes.
module qc_narrow #(parameter W = 8, N = 2) (
    input  wire           clk, rst,
    input  wire [N*W-1:0] s_d, input wire s_v, output wire s_r,
    output wire [W-1:0]   m_d, output wire m_v, input wire m_r);
  localparam C = $clog2(N + 1);
  reg [C-1:0]   n;
  reg [N*W-1:0] held;
  assign m_v = n != 0;
  assign m_d = held[W-1:0];
  assign s_r = n == 0 | (n == 1 & m_r);
  always @(posedge clk) begin
    if (s_v & s_r) held <= s_d;
    else if (m_v & m_r) held <= held >> W;
    if (rst) n <= 0;
    else if (s_v & s_r) n <= N;
    else if (m_v & m_r) n <= n - 1'b1;
  end
endmodule

// N streams' words one after the other for each pixel: COUNTS has 32 bits for how many of each.
module qc_concat #(parameter W = 8, N = 2, COUNTS = {32'd1, 32'd1}) (
    input  wire           clk, rst,
    input  wire [N*W-1:0] s_d, input wire [N-1:0] s_v, output wire [N-1:0] s_r,
    output reg  [W-1:0]   m_d, output reg m_v, input wire m_r);
  localparam [N*32-1:0] WORDS = COUNTS;
  localparam B = N > 1 ? $clog2(N) : 1;
  reg [B-1:0]  from;
  reg [31:0]   n;
  wire en = !m_v | m_r;
  wire issue = en & s_v[from];
  wire last = n == WORDS[from*32 +: 32];
  assign s_r = en ? {{(N-1){1'b0}}, 1'b1} << from : {N{1'b0}};
  always @(posedge clk) begin
    if (en) m_d <= s_d[from*W +: W];
    if (rst) begin
      n <= 1;
      from <= 0;
      m_v <= 0;
    end else if (en) begin
      m_v <= issue;
      if (issue) n <= last ? 1 : n + 1'b1;
      if (issue & last) from <= from == N - 1 ? 0 : from + 1'b1;
    end
  end
endmodule

// The same table for every lane, 2 enabled cycles later. FLIP makes the lowest code the first entry.
module qc_table #(parameter LANES = 1, XB = 8, FLIP = 1, OB = 8, FILE = "t.mem") (
    input  wire                clk, rst,
    input  wire [LANES*XB-1:0] s_d, input wire s_v, output wire s_r,
    output reg  [LANES*OB-1:0] m_d, output wire m_v, input wire m_r);
  reg [2:1] v;
  wire en = !v[2] | m_r;
  assign s_r = en;
  assign m_v = v[2];
  always @(posedge clk)
    if (rst) v <= 0;
    else if (en) v <= {v[1], s_v};
  genvar p;
  generate
    for (p = 0; p < LANES; p = p + 1) begin : lane
      reg  [OB-1:0] mem [0:(1<<XB)-1], word;
      wire [XB-1:0] x = s_d[p*XB +: XB];
      wire [XB-1:0] at = x ^ FLIP;
      initial $readmemh(FILE, mem);
      always @(posedge clk)
        if (en) begin
          word <= mem[at];
          m_d[p*OB +: OB] <= word;
        end
    end
  endgenerate
endmodule
`default_nettype wire
