// A FIFO of D words. What is pushed can be popped a cycle later; a full one takes nothing, even when it is popped.
`default_nettype none
module qc_fifo #(parameter W = 8, D = 2) (
    input  wire         clk, rst,
    input  wire [W-1:0] s_d, input wire s_v, output wire s_r,
    output wire [W-1:0] m_d, output wire m_v, input wire m_r);
  localparam A = D > 1 ? $clog2(D) : 1;
  localparam C = $clog2(D + 1);
  localparam [A-1:0] LAST = D - 1;
  localparam [C-1:0] FULL = D;

  reg [W-1:0] mem [0:D-1];
  reg [A-1:0] wp, rp;
  reg [C-1:0] n;
  reg         full, some;
  wire push = s_v & s_r, pop = m_v & m_r;
  wire [A-1:0] rp1 = rp == LAST ? {A{1'b0}} : rp + 1'b1;
  wire [A-1:0] rn = pop ? rp1 : rp;
  assign s_r = !full;
  assign m_v = some;

  generate
    if (D <= 16) begin : shallow
      assign m_d = mem[rp];
    end else begin : deep
      // the memory's output is registered, so that it may be a block RAM; what it cannot show yet comes from beside it
      reg [W-1:0] stored, fresh;
      reg         bypass;
      assign m_d = bypass ? fresh : stored;
      always @(posedge clk) begin
        stored <= mem[rn];
        fresh  <= s_d;
        bypass <= push && (pop ? wp == rp1 : wp == rp);
      end
    end
  endgenerate
  always @(posedge clk) begin
    if (push) mem[wp] <= s_d;
    if (rst) begin
      wp <= 0;
      rp <= 0;
      n  <= 0;
      full <= 0;
      some <= 0;
    end else begin
      if (push) wp <= wp == LAST ? {A{1'b0}} : wp + 1'b1;
      rp <= rn;
      if (push & !pop) begin
        n <= n + 1'b1;
        full <= n == FULL - 1'b1;
        some <= 1;
      end
      if (pop & !push) begin
        n <= n - 1'b1;
        full <= 0;
        some <= n != 1;
      end
    end
  end
endmodule
`default_nettype wire
