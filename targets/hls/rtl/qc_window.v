// The taps of a sliding window: for each output pixel the words of the input under the kernel, FILL outside of it.
// A pixel has F words. The order is rows of taps, taps, words; with BY_CHANNEL words, rows of taps, taps.
// A ring holds as many rows as the kernel spans, and one stride more: those are written while the last are read.
`default_nettype none

// The last of every N steps.
module qc_lap #(parameter N = 1) (input wire clk, rst, step, output reg last);
  localparam B = $clog2(N + 1);
  reg [B-1:0] n;
  always @(posedge clk)
    if (rst) begin
      n <= 0;
      last <= N == 1;
    end else if (step) begin
      n <= last ? 0 : n + 1'b1;
      last <= N == 1 || (!last && n == N - 2);
    end
endmodule

module qc_window #(parameter W = 8, F = 1, H = 4, WD = 4, OH = 2, OW = 2, KH = 3, KW = 3, SH = 1, SW = 1,
                   DH = 1, DW = 1, PT = 0, PL = 0, PB = 0, PR = 0, BY_CHANNEL = 0, FILL = 0) (
    input  wire         clk, rst,
    input  wire [W-1:0] s_d, input wire s_v, output wire s_r,
    output wire [W-1:0] m_d, output wire m_v, input wire m_r);
  localparam ROW = WD * F;
  localparam SPAN = (KH - 1) * DH + 1;
  localparam N = (SPAN + SH) * ROW;
  localparam A = $clog2(N) + 1;
  localparam R = 2 + $clog2((SPAN + PT + PB + SH + 2) * ROW + (PL + PR + KW * DW + SW) * F + 1);
  localparam X = 2 + $clog2(WD + PL + PR + KW * DW + SW);
  localparam Y = 2 + $clog2(H + PT + PB + KH * DH + SH);
  localparam COY = $clog2(OH + 1);

  // how far the read position moves when a tap, a row of taps, a word or a pixel is done
  localparam BACK = (KH - 1) * DH * ROW + (KW - 1) * DW * F;
  localparam D_X = BY_CHANNEL ? DW * F : DW * F - (F - 1);
  localparam D_Y = DH * ROW - (KW - 1) * DW * F - (BY_CHANNEL ? 0 : F - 1);
  localparam D_F = BY_CHANNEL ? 1 - BACK : 1;
  localparam D_O = SW * F - (F - 1) - BACK;

  function integer wrap(input integer n);
    wrap = ((n % N) + N) % N;
  endfunction
  // the first row of the image that output row oy needs
  function integer first(input integer oy);
    first = oy * SH - PT < 0 ? 0 : oy * SH - PT > H ? H : oy * SH - PT;
  endfunction
  function integer start(input integer oy);
    start = (oy * SH - PT - first(oy)) * ROW - PL * F;
  endfunction

  // for each output row: words to drop after it, how far its last tap is before the next row's first, and where in the
  // ring that one is, from the first word that is not dropped
  function integer drop(input integer oy);
    drop = ((oy == OH - 1 ? H : first(oy + 1)) - first(oy)) * ROW;
  endfunction
  function integer next(input integer oy);
    next = drop(oy) + start(oy == OH - 1 ? 0 : oy + 1);
  endfunction
  function integer leap(input integer oy);
    leap = next(oy) - (start(oy) + (OW - 1) * SW * F + BACK + F - 1);
  endfunction
  reg [A-1:0] drops [0:OH-1];
  reg [A-1:0] jumps [0:OH-1];
  reg signed [R-1:0] leaps [0:OH-1];
  integer i;
  initial
    for (i = 0; i < OH; i = i + 1) begin
      drops[i] = drop(i);
      leaps[i] = leap(i);
      jumps[i] = wrap(next(i));
    end

  reg [W-1:0] mem [0:N-1];
  reg [A-1:0] wa, ra, base;
  // how many words are there behind the one to read, beyond those to drop, and free but one: negative are none
  reg signed [R-1:0] ahead;
  reg signed [A:0]   spare, room;
  reg in_x, in_y;
  reg [COY-1:0] oy;

  wire last_f, last_x, last_y, last_ox, last_oy;
  wire row_end = last_f & last_x & last_y & last_ox;
  wire present = in_x & in_y;
  // what the tables say of this row, looked up while the row before it was read
  reg [A-1:0] dropped, jump;
  reg signed [R-1:0] over;
  wire [COY-1:0] oy1 = last_oy ? 0 : oy + 1'b1;

  reg         v1, v2, p1;
  reg [W-1:0] q1, q2;
  wire en = !v2 | m_r;
  wire go = en && (!present || !ahead[R-1]) && (!row_end || !spare[A]);
  wire wt = s_v & s_r;
  assign s_r = !room[A];
  assign m_v = v2;
  assign m_d = q2;

  wire f_done = BY_CHANNEL ? last_x & last_y : 1'b1;
  wire x_done = BY_CHANNEL ? 1'b1 : last_f;
  wire y_done = x_done & last_x;
  wire o_done = last_f & last_x & last_y;
  qc_lap #(.N(F)) lap_f (.clk(clk), .rst(rst), .step(go & f_done), .last(last_f));
  qc_lap #(.N(KW)) lap_x (.clk(clk), .rst(rst), .step(go & x_done), .last(last_x));
  qc_lap #(.N(KH)) lap_y (.clk(clk), .rst(rst), .step(go & y_done), .last(last_y));
  qc_lap #(.N(OW)) lap_ox (.clk(clk), .rst(rst), .step(go & o_done), .last(last_ox));
  qc_lap #(.N(OH)) lap_oy (.clk(clk), .rst(rst), .step(go & row_end), .last(last_oy));

  // the columns and rows that the next tap may be in, and whether they are inside; below zero is far above the last
  localparam [X-1:0] WIDTH = WD, LEFT = -PL;
  localparam [Y-1:0] HEIGHT = H, TOP = -PT;
  reg [X-1:0] x, xs;
  reg [Y-1:0] y, ys;
  wire [X-1:0] x_tap = x + DW, x_pixel = last_ox ? LEFT : xs + SW;
  wire [Y-1:0] y_tap = y + DH, y_pixel = last_oy ? TOP : ys + SH;
  wire [A-1:0] step = o_done ? wrap(D_O) : BY_CHANNEL ? (!last_x ? wrap(D_X) : !last_y ? wrap(D_Y) : wrap(D_F))
                                                      : (!last_f ? wrap(D_F) : !last_x ? wrap(D_X) : wrap(D_Y));
  wire signed [R-1:0] move = row_end ? over : o_done ? D_O : BY_CHANNEL ? (!last_x ? D_X : !last_y ? D_Y : D_F)
                                                       : (!last_f ? D_F : !last_x ? D_X : D_Y);
  // positions in the ring wrap: either sum is right, and the second is so where it is not negative
  localparam [A+1:0] RING = N;
  wire [A:0] from = row_end ? base : ra, by = row_end ? jump : step;
  wire [A:0] ra_sum = from + by, base_sum = base + dropped;
  wire [A+1:0] ra_less = from + by - RING, base_less = base + dropped - RING;

  always @(posedge clk) begin
    if (wt) mem[wa] <= s_d;
    if (en) begin
      q1 <= mem[ra];
      p1 <= !present;
      q2 <= p1 ? FILL : q1;
    end
    if (rst) begin
      v1 <= 0; v2 <= 0; wa <= 0; base <= 0;
      ahead <= -start(0) - 1; spare <= -drop(0); room <= N - 1;
      ra <= wrap(start(0));
      dropped <= drop(0); jump <= wrap(next(0)); over <= leap(0);
      oy <= 0;
      x <= LEFT; xs <= LEFT; in_x <= LEFT < WIDTH;
      y <= TOP; ys <= TOP; in_y <= TOP < HEIGHT;
    end else begin
      if (en) begin
        v1 <= go;
        v2 <= v1;
      end
      if (wt) wa <= wa == N - 1 ? 0 : wa + 1'b1;
      ahead <= go ? ahead - move + $signed({1'b0, wt}) : ahead + $signed({1'b0, wt});
      spare <= go & row_end ? spare - $signed({1'b0, drops[oy1]}) + $signed({1'b0, wt}) : spare + $signed({1'b0, wt});
      room <= go & row_end ? room + $signed({1'b0, dropped}) - $signed({1'b0, wt}) : room - $signed({1'b0, wt});
      if (go) begin
        ra <= ra_less[A+1] ? ra_sum : ra_less;
        if (row_end) begin
          base <= base_less[A+1] ? base_sum : base_less;
          dropped <= drops[oy1];
          jump <= jumps[oy1];
          over <= leaps[oy1];
          oy <= oy1;
        end
        if (o_done) begin
          x <= x_pixel;
          xs <= x_pixel;
          in_x <= x_pixel < WIDTH;
        end else if (x_done) begin
          x <= last_x ? xs : x_tap;
          in_x <= last_x ? xs < WIDTH : x_tap < WIDTH;
        end
        if (row_end) begin
          y <= y_pixel;
          ys <= y_pixel;
          in_y <= y_pixel < HEIGHT;
        end else if (y_done) begin
          y <= last_y ? ys : y_tap;
          in_y <= last_y ? ys < HEIGHT : y_tap < HEIGHT;
        end
      end
    end
  end
endmodule
`default_nettype wire
