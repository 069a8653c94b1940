// Between an accelerator's streams and AXI: AXI4-Stream with beats of whole bytes, AXI4-Lite. `rst` is synchronous.
// No output of an AXI port depends on an input of one within a cycle.
`default_nettype none

// A register on both sides of a stream: neither its valid nor its ready passes through in a cycle. `run` lets words in.
module qc_axis_slice #(parameter W = 8) (
    input  wire         clk, rst, run,
    input  wire [W-1:0] s_d, input wire s_v, output reg s_r,
    output reg  [W-1:0] m_d, output reg m_v, input wire m_r);
  reg [W-1:0] held;
  reg         full;
  wire take = s_v & s_r, free = !m_v | m_r;
  wire fills = !free & (full | take);
  always @(posedge clk) begin
    if (take) held <= s_d;
    if (free) m_d <= full ? held : s_d;
    if (rst) begin
      s_r  <= 1'b0;
      m_v  <= 1'b0;
      full <= 1'b0;
    end else begin
      s_r  <= run & !fills;
      full <= fills;
      if (free) m_v <= full | take;
    end
  end
endmodule

// Counts the COUNT beats or words of an image and the images of a packet of `batch`, where 0 is as good as 1.
module qc_axis_place #(parameter COUNT = 1) (
    input  wire        clk, rst, step,
    input  wire [15:0] batch,
    output wire        first, ends_image, ends_packet,
    output reg  [31:0] images);
  localparam [31:0] LAST = COUNT - 1;
  reg [31:0] n;
  reg [15:0] image;
  assign first = n == 0;
  assign ends_image = n == LAST;
  assign ends_packet = ends_image & {1'b0, image} + 17'd1 >= {1'b0, batch};
  always @(posedge clk)
    if (rst) begin
      n <= 0;
      image <= 0;
      images <= 0;
    end else if (step) begin
      n <= ends_image ? 32'd0 : n + 32'd1;
      if (ends_image) begin
        image <= ends_packet ? 16'd0 : image + 16'd1;
        images <= images + 32'd1;
      end
    end
endmodule

// Beats to words of W bits: PER_BEAT words share a beat, each in as many bits, or a word takes PER_WORD beats, the lowest
// first. The last beat of an image may hold fewer words. `wrong`: tlast too early, none, a beat that is not all there.
module qc_axis_in #(parameter BUS = 32, W = 8, PER_BEAT = 1, PER_WORD = 1, WORDS = 1) (
    input  wire             clk, rst, run,
    input  wire [15:0]      batch,
    input  wire [BUS-1:0]   s_tdata,
    input  wire [BUS/8-1:0] s_tkeep,
    input  wire             s_tlast, s_tvalid,
    output wire             s_tready,
    output wire [W-1:0]     m_d, output wire m_v, input wire m_r,
    output reg  [2:0]       wrong,
    output wire             between,
    output wire [31:0]      images);
  localparam BEATS = (WORDS * PER_WORD + PER_BEAT - 1) / PER_BEAT;
  localparam REST = WORDS * PER_WORD - (BEATS - 1) * PER_BEAT;

  wire ends_image, ends_packet;
  wire take = s_tvalid & s_tready;
  qc_axis_place #(.COUNT(BEATS)) place (
      .clk(clk), .rst(rst), .step(take), .batch(batch),
      .first(between), .ends_image(ends_image), .ends_packet(ends_packet), .images(images));
  always @(posedge clk)
    if (rst) wrong <= 3'b000;
    else wrong <= {3{take}} & {!(&s_tkeep), ends_packet & !s_tlast, s_tlast & !ends_packet};

  // the padding of words and beats is not read, nor the end of an image where no beat is shared
  // verilator lint_off UNUSEDSIGNAL
  wire [BUS-1:0] b_d;
  wire b_last, b_v, b_r;
  qc_axis_slice #(.W(BUS + 1)) slice (
      .clk(clk), .rst(rst), .run(run), .s_d({ends_image, s_tdata}), .s_v(s_tvalid), .s_r(s_tready),
      .m_d({b_last, b_d}), .m_v(b_v), .m_r(b_r));

  generate
    if (PER_BEAT > 1) begin : several
      localparam SLOT = BUS / PER_BEAT;
      localparam C = $clog2(PER_BEAT + 1);
      localparam [31:0] ALL = PER_BEAT, FEW = REST;
      reg [C-1:0]   n;
      reg [BUS-1:0] held;
      assign m_v = n != 0;
      assign m_d = held[W-1:0];
      assign b_r = n == 0 | (n == 1 & m_r);
      always @(posedge clk) begin
        if (b_v & b_r) held <= b_d;
        else if (m_v & m_r) held <= held >> SLOT;
        if (rst) n <= 0;
        else if (b_v & b_r) n <= b_last ? FEW[C-1:0] : ALL[C-1:0];
        else if (m_v & m_r) n <= n - 1'b1;
      end
    end else if (PER_WORD > 1) begin : part
      localparam C = $clog2(PER_WORD);
      localparam [31:0] LAST = PER_WORD - 1;
      reg  [C-1:0] n;
      reg  [(PER_WORD-1)*BUS-1:0] held;
      wire [PER_WORD*BUS-1:0] whole = {b_d, held};
      wire last = n == LAST[C-1:0];
      assign m_v = b_v & last;
      assign m_d = whole[W-1:0];
      assign b_r = !last | m_r;
      always @(posedge clk) begin
        if (b_v & !last) held <= whole[PER_WORD*BUS-1:BUS];
        if (rst) n <= 0;
        else if (b_v & b_r) n <= last ? {C{1'b0}} : n + 1'b1;
      end
    end else begin : alone
      assign m_v = b_v;
      assign m_d = b_d[W-1:0];
      assign b_r = m_r;
    end
  endgenerate
  // verilator lint_on UNUSEDSIGNAL
endmodule

// Words to beats, as qc_axis_in reads them; padding is 0. `idle`: nothing waits here and no image is under way.
module qc_axis_out #(parameter BUS = 32, W = 8, PER_BEAT = 1, PER_WORD = 1, WORDS = 1) (
    input  wire             clk, rst,
    input  wire [15:0]      batch,
    input  wire [W-1:0]     s_d, input wire s_v, output wire s_r,
    output wire [BUS-1:0]   m_tdata,
    output wire [BUS/8-1:0] m_tkeep,
    output wire             m_tlast, m_tvalid,
    input  wire             m_tready,
    output wire             idle,
    output wire [31:0]      images);
  wire first, ends_packet;
  wire take = s_v & s_r;
  // it ends a beat that words share
  // verilator lint_off UNUSEDSIGNAL
  wire ends_image;
  // verilator lint_on UNUSEDSIGNAL
  qc_axis_place #(.COUNT(WORDS)) place (
      .clk(clk), .rst(rst), .step(take), .batch(batch),
      .first(first), .ends_image(ends_image), .ends_packet(ends_packet), .images(images));

  wire [BUS-1:0] b_d;
  wire b_last, b_v, b_r;
  generate
    if (PER_BEAT > 1) begin : several
      localparam SLOT = BUS / PER_BEAT;
      localparam C = $clog2(PER_BEAT);
      localparam [31:0] LAST = PER_BEAT - 1;
      reg [C-1:0]   n;
      reg [BUS-1:0] held;
      reg           v, last;
      wire [BUS-1:0] word = {{(BUS-W){1'b0}}, s_d};
      assign s_r = !v | b_r;
      assign b_d = held;
      assign b_v = v;
      assign b_last = last;
      always @(posedge clk) begin
        if (take) held <= n == 0 ? word : held | word << n * SLOT;
        if (take) last <= ends_packet;
        if (rst) begin
          n <= 0;
          v <= 1'b0;
        end else if (s_r) begin
          v <= s_v & (ends_image | n == LAST[C-1:0]);
          if (s_v) n <= ends_image | n == LAST[C-1:0] ? {C{1'b0}} : n + 1'b1;
        end
      end
    end else if (PER_WORD > 1) begin : part
      localparam C = $clog2(PER_WORD + 1);
      localparam [C-1:0] ALL = PER_WORD;
      reg [C-1:0] n;
      reg [PER_WORD*BUS-1:0] held;
      reg last;
      assign s_r = n == 0 | (n == 1 & b_r);
      assign b_d = held[BUS-1:0];
      assign b_v = n != 0;
      assign b_last = last & n == 1;
      always @(posedge clk) begin
        if (take) held <= {{(PER_WORD*BUS-W){1'b0}}, s_d};
        else if (b_v & b_r) held <= held >> BUS;
        if (take) last <= ends_packet;
        if (rst) n <= 0;
        else if (take) n <= ALL;
        else if (b_v & b_r) n <= n - 1'b1;
      end
    end else begin : alone
      assign s_r = b_r;
      assign b_d = {{(BUS-W){1'b0}}, s_d};
      assign b_v = s_v;
      assign b_last = ends_packet;
    end
  endgenerate

  qc_axis_slice #(.W(BUS + 1)) slice (
      .clk(clk), .rst(rst), .run(1'b1), .s_d({b_last, b_d}), .s_v(b_v), .s_r(b_r),
      .m_d({m_tlast, m_tdata}), .m_v(m_tvalid), .m_r(m_tready));
  assign m_tkeep = {BUS/8{1'b1}};
  assign idle = first & !b_v & !m_tvalid;
endmodule

// An AXI4-Lite slave of 32-bit registers: address and data of a write may come in any order; every answer is OKAY.
// A register stands at every fourth byte: the two lowest bits of an address are not looked at.
module qc_axi_lite #(parameter A = 12) (
    input  wire         clk, rst,
    // verilator lint_off UNUSEDSIGNAL
    input  wire [A-1:0] s_axi_awaddr, input wire s_axi_awvalid, output wire s_axi_awready,
    // verilator lint_on UNUSEDSIGNAL
    input  wire [31:0]  s_axi_wdata, input wire [3:0] s_axi_wstrb, input wire s_axi_wvalid, output wire s_axi_wready,
    output wire [1:0]   s_axi_bresp, output reg s_axi_bvalid, input wire s_axi_bready,
    // verilator lint_off UNUSEDSIGNAL
    input  wire [A-1:0] s_axi_araddr, input wire s_axi_arvalid, output wire s_axi_arready,
    // verilator lint_on UNUSEDSIGNAL
    output reg  [31:0]  s_axi_rdata, output wire [1:0] s_axi_rresp, output reg s_axi_rvalid, input wire s_axi_rready,
    output wire         write,
    output reg  [A-3:0] write_at,
    output reg  [31:0]  write_d,
    output reg  [3:0]   write_bytes,
    output reg  [A-3:0] read_at,
    input  wire [31:0]  read_d);
  reg aw, w, ar;
  assign s_axi_awready = !aw;
  assign s_axi_wready = !w;
  assign s_axi_arready = !ar;
  assign s_axi_bresp = 2'b00;
  assign s_axi_rresp = 2'b00;
  assign write = aw & w & (!s_axi_bvalid | s_axi_bready);
  wire read = ar & (!s_axi_rvalid | s_axi_rready);
  always @(posedge clk) begin
    if (s_axi_awvalid & !aw) write_at <= s_axi_awaddr[A-1:2];
    if (s_axi_arvalid & !ar) read_at <= s_axi_araddr[A-1:2];
    if (s_axi_wvalid & !w) begin
      write_d <= s_axi_wdata;
      write_bytes <= s_axi_wstrb;
    end
    if (read) s_axi_rdata <= read_d;
    if (rst) begin
      aw <= 1'b0;
      w  <= 1'b0;
      ar <= 1'b0;
      s_axi_bvalid <= 1'b0;
      s_axi_rvalid <= 1'b0;
    end else begin
      aw <= aw ? !write : s_axi_awvalid;
      w  <= w ? !write : s_axi_wvalid;
      ar <= ar ? !read : s_axi_arvalid;
      s_axi_bvalid <= write | (s_axi_bvalid & !s_axi_bready);
      s_axi_rvalid <= read | (s_axi_rvalid & !s_axi_rready);
    end
  end
endmodule

// Cycles: from the first word into an accelerator that had nothing to do until the first image was out of it, and
// between the last two images. `images` counts those that all OUTS outputs have given.
module qc_axi_clock #(parameter OUTS = 1) (
    input  wire clk, rst, busy, enters,
    input  wire [32*OUTS-1:0] given,
    output reg  [31:0] images, latency, interval);
  reg [31:0] age, since;
  reg ready, counts;
  wire [OUTS-1:0] more;
  genvar k;
  generate
    for (k = 0; k < OUTS; k = k + 1) begin : output_port
      assign more[k] = given[32*k +: 32] != images;
    end
  endgenerate
  wire done = &more;
  always @(posedge clk)
    if (rst) begin
      images <= 0;
      latency <= 0;
      interval <= 0;
      age <= 0;
      since <= 0;
      ready <= 1'b1;
      counts <= 1'b0;
    end else begin
      ready <= !enters & (ready | !busy);
      age <= ready & enters ? 32'd1 : age + 32'd1;
      since <= done ? 32'd1 : since + 32'd1;
      if (ready & enters) counts <= 1'b1;
      else if (done) counts <= 1'b0;
      if (done) begin
        images <= images + 32'd1;
        if (counts) latency <= age;
        if (images != 0) interval <= since;
      end
    end
endmodule
`default_nettype wire
