"""A board that is a simulation: Icarus runs the AXI wrapper a cycle at a time, and a module stands for pynq."""

from __future__ import annotations

import random
import re
import subprocess
import types
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

# ------------------------------------------------------------------------------------ the board

PIN = re.compile(r"^\s*(input |output) wire (?:\[(\d+):0\] )?(\w+),?$", re.M)


@dataclass
class Sender:
    """A stream's source: what it offers stays until it is taken."""

    beats: deque[tuple[int, int]] = field(default_factory=deque)
    offered: bool = False
    keep: int | None = None


@dataclass
class Receiver:
    """A stream's reader: ready only while it waits for a packet."""

    beats: list[int] = field(default_factory=list)
    open: bool = False
    last: bool = False


class Board:
    """The wrapper in Icarus. `seed` 0: nobody pauses."""

    def __init__(self, files: Mapping[str, bytes], folder: Path, seed: int = 0) -> None:
        for path, content in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)
        top = (folder / "axi/net_axi.v").read_text()
        found = [(d.strip(), int(w or 0) + 1, n) for d, w, n in PIN.findall(top)]
        self.ins = [(n, w) for d, w, n in found if d == "input" and n != "aclk"]
        self.outs = [(n, w) for d, w, n in found if d == "output"]
        bench = _bench(self.ins, self.outs)
        (folder / "bench.v").write_text(bench)
        sources = [str(p) for f in ("axi", "rtl") for p in sorted((folder / f).glob("*.v"))]
        subprocess.run(
            ["iverilog", "-g2005", "-s", "bench", "-o", "board.vvp", "bench.v", *sources],
            cwd=folder,
            check=True,
        )
        self.process = subprocess.Popen(
            ["vvp", "-n", "../board.vvp"],
            cwd=folder / "rtl",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.random, self.seed, self.clock = random.Random(seed), seed, 0
        self.turn, self.rates = 0, [0.0, 0.0]
        self.pins = dict.fromkeys((n for n, _ in self.ins), 0)
        self.seen: dict[str, int | None] = {n: None for n, _ in self.outs}
        self.shown = ""
        count = {s: sum(n.startswith(f"{s}_axis_") and n.endswith("tvalid") for _, _, n in found)
                 for s in "sm"}  # fmt: skip
        self.senders = [Sender() for _ in range(count["s"])]
        self.receivers = [Receiver() for _ in range(count["m"])]
        self.wide = dict((*self.ins, *self.outs))["s_axis_in0_tdata"]
        self.held = False
        for _ in range(4):
            self._edge()
        self.pins["aresetn"] = 1

    def _edge(self) -> None:
        """One clock; no output follows an input within a cycle."""
        word, at = 0, 0
        for name, width in self.ins:
            word |= self.pins[name] << at
            at += width
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{word:x}\n")
        self.process.stdin.flush()
        before, after = self.process.stdout.readline().split()
        assert before == self.shown or not self.shown
        self.shown, self.clock, at = after, self.clock + 1, len(after)
        for name, width in self.outs:
            bits = after[at - width : at]
            self.seen[name] = int(bits, 2) if set(bits) <= {"0", "1"} else None
            at -= width

    def pause(self, side: int = 0) -> bool:
        """Each side is now quick, now slow."""
        if self.clock >= self.turn:
            self.turn = self.clock + self.random.randrange(60)
            self.rates = [self.random.choice((0.0, 0.3, 0.9)) for _ in "sm"]
        return self.seed != 0 and self.random.random() < self.rates[side]

    def cycle(self) -> None:
        """Senders offer, receivers take, one clock goes by; an offer stays as it is until it is taken."""
        for k, s in enumerate(self.senders):
            s.offered = s.offered or (bool(s.beats) and not self.pause())
            data, last = s.beats[0] if s.offered else (0, 0)
            whole = (1 << self.wide // 8) - 1 if s.keep is None else s.keep
            self._set(f"s_axis_in{k}", tdata=data, tlast=last, tkeep=whole, tvalid=int(s.offered))
        for k, r in enumerate(self.receivers):
            self._set(f"m_axis_out{k}", tready=int(r.open and not self.pause(1)))
        was = dict(self.seen)
        taken = [
            (s, s.offered and was[f"s_axis_in{k}_tready"] == 1) for k, s in enumerate(self.senders)
        ]
        moved = []
        for k, r in enumerate(self.receivers):
            n = f"m_axis_out{k}"
            assert was[f"{n}_tvalid"] is not None
            moves = was[f"{n}_tvalid"] == 1 and self.pins[f"{n}_tready"] == 1
            moved.append((n, r, moves))
        self._edge()
        for s, took in taken:
            if took:
                s.beats.popleft()
                s.offered = False
        for n, r, moves in moved:
            if moves:
                beat, last, keep = (was[f"{n}_{pin}"] for pin in ("tdata", "tlast", "tkeep"))
                assert beat is not None
                assert keep == (1 << self.wide // 8) - 1
                r.beats.append(beat)
                r.last = last == 1
                r.open = not r.last
            elif was[f"{n}_tvalid"] and not self.held:
                for pin in ("tdata", "tlast", "tvalid"):
                    assert self.seen[f"{n}_{pin}"] == was[f"{n}_{pin}"]

    def _set(self, port: str, **pins: int) -> None:
        self.pins.update({f"{port}_{pin}": value for pin, value in pins.items()})

    def send(self, k: int, payload: bytes, ends: Callable[[int, int], bool]) -> None:
        """Beats for input k; `ends` says of a beat's number and the count whether it has tlast."""
        step = self.wide // 8
        count = len(payload) // step
        for i in range(count):
            beat = int.from_bytes(payload[i * step : (i + 1) * step], "little")
            self.senders[k].beats.append((beat, int(ends(i, count))))

    def until(self, done: Callable[[], bool], most: int = 20000) -> None:
        for _ in range(most):
            if done():
                return
            self.cycle()
        raise TimeoutError(f"nothing after {most} cycles")

    def write(self, at: int, value: int, strobe: int = 15) -> None:
        """Address and data in any order."""
        left = {"aw", "w"}
        self._set("s_axi", awaddr=at, wdata=value, wstrb=strobe)
        while left:
            offers = {c for c in left if self.pins[f"s_axi_{c}valid"] or not self.pause()}
            for c in left:
                self.pins[f"s_axi_{c}valid"] = int(c in offers)
            takes = {c for c in offers if self.seen[f"s_axi_{c}ready"] == 1}
            self.cycle()
            for c in takes:
                self.pins[f"s_axi_{c}valid"] = 0
            left -= takes
        assert self._answer("b") == {"bresp": 0}

    def read(self, at: int) -> int:
        self._set("s_axi", araddr=at, arvalid=1)
        self.until(lambda: self.seen["s_axi_arready"] == 1, 50)
        self.cycle()
        self._set("s_axi", arvalid=0, araddr=0xFFC)
        answer = self._answer("r")
        assert answer["rresp"] == 0
        return answer["rdata"]

    def _answer(self, channel: str) -> dict[str, int]:
        """An answer stays until it is taken."""
        self.until(lambda: self.seen[f"s_axi_{channel}valid"] == 1, 50)
        while self.pause():
            self.cycle()
            assert self.seen[f"s_axi_{channel}valid"] == 1
        names = ["bresp"] if channel == "b" else ["rdata", "rresp"]
        got = {n: self.seen[f"s_axi_{n}"] for n in names}
        self.pins[f"s_axi_{channel}ready"] = 1
        self.cycle()
        self.pins[f"s_axi_{channel}ready"] = 0
        assert self.seen[f"s_axi_{channel}valid"] == 0
        return {n: v for n, v in got.items() if v is not None}

    def hold(self, value: int) -> None:
        """Write CONTROL; what the outputs offer may go when that holds them."""
        self.held = True
        self.write(0x08, value)
        for _ in range(3):
            self.cycle()
        self.held = False


def _bench(ins: list[tuple[str, int]], outs: list[tuple[str, int]]) -> str:
    ports, lines = {"i": ins, "o": outs}, []
    for letter, pins in ports.items():
        at = 0
        for name, width in pins:
            lines.append(f".{name}({letter}[{at + width - 1}:{at}])")
            at += width
    wide = {letter: sum(w for _, w in pins) for letter, pins in ports.items()}
    return f"""module bench;
      reg aclk = 0;
      reg [{wide["i"] - 1}:0] i = 0;
      wire [{wide["o"] - 1}:0] o;
      integer got;
      net_axi dut (.aclk(aclk), {", ".join(lines)});
      initial begin
        got = 1;
        while (got == 1) begin
          got = $fscanf(32'h8000_0000, "%h", i);
          #1 $write("%b ", o);
          #1 aclk = 1;
          #1 aclk = 0;
          #1 $display("%b", o);
          $fflush;
        end
        $finish;
      end
    endmodule
    """


@contextmanager
def board(files: Mapping[str, bytes], folder: Path, seed: int = 0) -> Iterator[Board]:
    made = Board(files, folder, seed)
    try:
        yield made
    finally:
        made.process.kill()
        made.process.communicate()


# ------------------------------------------------------------------------------------- pynq


class Channel:
    """A direction of a DMA engine: `k` of the board's senders or receivers."""

    def __init__(self, made: Board, k: int, sends: bool) -> None:
        self.board, self.k, self.sends = made, k, sends
        self.due: np.ndarray | None = None
        self.error = False

    def start(self) -> None:
        self.due, self.error = None, False
        if self.sends:
            self.board.senders[self.k] = Sender()
        else:
            self.board.receivers[self.k] = Receiver()

    def transfer(self, array: np.ndarray, start: int = 0, nbytes: int = 0) -> None:
        assert start == 0
        assert self.due is None
        self.due = array.reshape(-1)[:nbytes]
        if self.sends:
            self.board.send(self.k, self.due.tobytes(), lambda i, count: i == count - 1)
        else:
            self.board.receivers[self.k] = Receiver(open=True)

    @property
    def idle(self) -> bool:
        if self.due is None:
            return True
        self.board.cycle()
        if self.sends:
            done = not self.board.senders[self.k].beats
        else:
            r = self.board.receivers[self.k]
            full = len(r.beats) * self.board.wide // 8 == len(self.due)
            # a packet that is not as long as the buffer stops the engine
            self.error = full != r.last
            done = full and r.last
            if done:
                step = self.board.wide // 8
                joined = b"".join(b.to_bytes(step, "little") for b in r.beats)
                self.due[:] = np.frombuffer(joined, np.uint8)
        if done:
            self.due = None
        return done

    def wait(self) -> None:
        assert self.idle


class Dma:
    def __init__(self, made: Board, k: int, sends: bool) -> None:
        self.channel = Channel(made, k, sends)
        setattr(self, "sendchannel" if sends else "recvchannel", self.channel)

    def write(self, offset: int, value: int) -> None:
        assert (offset, value) == (0x00 if self.channel.sends else 0x30, 4)
        self.channel.start()


class Registers:
    def __init__(self, made: Board) -> None:
        self.board = made

    def read(self, at: int) -> int:
        return self.board.read(at)

    def write(self, at: int, value: int) -> None:
        if at == 0x08:
            self.board.hold(value)
        else:
            self.board.write(at, value)


def pynq(made: Board) -> types.ModuleType:
    """What the driver imports: the overlay's parts are the board's, buffers hold what was there before."""
    parts: dict[str, object] = {"accelerator": Registers(made)}
    parts |= {f"in{k}_dma": Dma(made, k, True) for k in range(len(made.senders))}
    parts |= {f"out{k}_dma": Dma(made, k, False) for k in range(len(made.receivers))}
    fake = types.ModuleType("pynq")
    fake.Overlay = lambda bitstream: types.SimpleNamespace(**parts)
    fake.allocate = lambda shape, dtype: np.full(shape, 0xA5, dtype)
    return fake
