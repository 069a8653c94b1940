// The taps of a sliding window: for each output pixel the words of the input under the kernel, FILL outside of it.
// A pixel has F words. The order is rows of taps, taps, words; with BY_CHANNEL words, rows of taps, taps.
// A ring holds as many rows as the kernel spans, and one stride more: those are written while the last are read.
`default_nettype none
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
  localparam CF = $clog2(F + 1), CX = $clog2(KW + 1), CY = $clog2(KH + 1);
  localparam COX = $clog2(OW + 1), COY = $clog2(OH + 1);

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

  // for each output row: words to drop after it, and where the next row's first tap is, from there and in the ring
  function integer drop(input integer oy);
    drop = ((oy == OH - 1 ? H : first(oy + 1)) - first(oy)) * ROW;
  endfunction
  function integer next(input integer oy);
    next = start(oy == OH - 1 ? 0 : oy + 1);
  endfunction
  reg [A-1:0] drops [0:OH-1];
  reg [A-1:0] jumps [0:OH-1];
  reg signed [R-1:0] nexts [0:OH-1];
  integer i;
  initial
    for (i = 0; i < OH; i = i + 1) begin
      drops[i] = drop(i);
      nexts[i] = next(i);
      jumps[i] = wrap(drop(i) + next(i));
    end

  reg [W-1:0] mem [0:N-1];
  reg [A-1:0] wa, ra, base, held;
  reg signed [R-1:0] at;
  reg signed [X-1:0] x, xs;
  reg signed [Y-1:0] y, ys;
  reg                in_x, in_y;
  reg [CF-1:0] f;
  reg [CX-1:0] kx;
  reg [CY-1:0] ky;
  reg [COX-1:0] ox;
  reg [COY-1:0] oy;

  wire last_f = f == F - 1, last_x = kx == KW - 1, last_y = ky == KH - 1;
  wire last_ox = ox == OW - 1, last_oy = oy == OH - 1;
  wire row_end = last_f & last_x & last_y & last_ox;
  wire present = in_x & in_y;
  wire signed [R-1:0] have = $signed({{(R-A){1'b0}}, held});
  // what the tables say of this row, looked up while the row before it was read
  reg [A-1:0] dropped, jump;
  reg signed [R-1:0] after;
  wire [COY-1:0] oy1 = last_oy ? 0 : oy + 1'b1;

  reg         v1, v2, p1;
  reg [W-1:0] q1, q2;
  wire en = !v2 | m_r;
  wire go = en && (!present || at < have) && (!row_end || dropped <= held);
  wire wt = s_v & s_r;
  assign s_r = held != N;
  assign m_v = v2;
  assign m_d = q2;

  wire f_done = BY_CHANNEL ? last_x & last_y : 1'b1;
  wire x_done = BY_CHANNEL ? 1'b1 : last_f;
  wire y_done = x_done & last_x;
  wire o_done = last_f & last_x & last_y;
  // the next tap's column and row
  wire signed [X-1:0] x1 = o_done ? (last_ox ? -PL : xs + SW) : !x_done ? x : last_x ? xs : x + DW;
  wire signed [Y-1:0] y1 = row_end ? (last_oy ? -PT : ys + SH) : !y_done ? y : last_y ? ys : y + DH;
  wire [A-1:0] step = o_done ? wrap(D_O) : BY_CHANNEL ? (!last_x ? wrap(D_X) : !last_y ? wrap(D_Y) : wrap(D_F))
                                                      : (!last_f ? wrap(D_F) : !last_x ? wrap(D_X) : wrap(D_Y));
  wire signed [R-1:0] move = o_done ? D_O : BY_CHANNEL ? (!last_x ? D_X : !last_y ? D_Y : D_F)
                                                       : (!last_f ? D_F : !last_x ? D_X : D_Y);
  // positions in the ring wrap: either sum is right, and the second is so where it is not negative
  localparam [A+1:0] RING = N;
  wire [A:0] from = row_end ? base : ra, by = row_end ? jump : step;
  wire [A:0] ra_sum = from + by, base_sum = base + dropped, held_sum = held + wt;
  wire [A+1:0] ra_less = from + by - RING, base_less = base + dropped - RING;

  always @(posedge clk) begin
    if (wt) mem[wa] <= s_d;
    if (en) begin
      q1 <= mem[ra];
      p1 <= !present;
      q2 <= p1 ? FILL : q1;
    end
    if (rst) begin
      v1 <= 0; v2 <= 0; held <= 0; wa <= 0; base <= 0;
      ra <= wrap(start(0));
      at <= start(0);
      dropped <= drop(0); jump <= wrap(drop(0) + next(0)); after <= next(0);
      f <= 0; kx <= 0; ky <= 0; ox <= 0; oy <= 0;
      x <= -PL; xs <= -PL; in_x <= PL <= 0 && -PL < WD;
      y <= -PT; ys <= -PT; in_y <= PT <= 0 && -PT < H;
    end else begin
      if (en) begin
        v1 <= go;
        v2 <= v1;
      end
      if (wt) wa <= wa == N - 1 ? 0 : wa + 1'b1;
      held <= go & row_end ? held_sum - dropped : held_sum;
      if (go) begin
        ra <= ra_less[A+1] ? ra_sum : ra_less;
        at <= row_end ? after : at + move;
        if (row_end) begin
          base <= base_less[A+1] ? base_sum : base_less;
          dropped <= drops[oy1];
          jump <= jumps[oy1];
          after <= nexts[oy1];
        end
        if (f_done) f <= last_f ? 0 : f + 1'b1;
        if (x_done) kx <= last_x ? 0 : kx + 1'b1;
        if (y_done) ky <= last_y ? 0 : ky + 1'b1;
        x <= x1;
        y <= y1;
        in_x <= x1 >= 0 && x1 < WD;
        in_y <= y1 >= 0 && y1 < H;
        if (o_done) begin
          ox <= last_ox ? 0 : ox + 1'b1;
          xs <= x1;
        end
        if (row_end) begin
          oy <= oy1;
          ys <= y1;
        end
      end
    end
  end
endmodule
`default_nettype wire
