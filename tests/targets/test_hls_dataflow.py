"""The C++ as hardware runs it: every unit at the same time, FIFOs of the emitted depths. The shim's never fill."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from qcompile.ir import Graph
from qcompile.target import Fabric
from qcompile.targets.hls import cplusplus, folding
from qcompile.targets.hls.pipeline import Pipeline
from tests.strategies import feeds
from tests.targets.test_families import network
from tests.targets.test_pipeline import residual

BOUNDED = """
#ifndef BOUNDED_STREAM_H_
#define BOUNDED_STREAM_H_
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <mutex>
#include <unistd.h>

namespace hls {
template <class T> class stream {
  public:
    explicit stream(const char *name = "port", std::size_t depth = 1 << 30) : name_(name), depth_(depth) {}
    bool empty() const { return words_.empty(); }
    T read() {
        std::unique_lock<std::mutex> lock(mutex_);
        if (!moved_.wait_for(lock, limit(), [this] { return !words_.empty(); }))
            stuck("empty");
        T word = words_.front();
        words_.pop_front();
        moved_.notify_all();
        return word;
    }
    void write(const T &word) {
        std::unique_lock<std::mutex> lock(mutex_);
        if (!moved_.wait_for(lock, limit(), [this] { return words_.size() < depth_; }))
            stuck("full");
        words_.push_back(word);
        moved_.notify_all();
    }

  private:
    static std::chrono::seconds limit() { return std::chrono::seconds(20); }
    void stuck(const char *how) {
        std::printf("stuck: %s is %s\\n", name_, how);
        std::fflush(stdout);
        _exit(9);
    }
    const char *name_;
    std::size_t depth_;
    std::deque<T> words_;
    std::mutex mutex_;
    std::condition_variable moved_;
};
}
#endif
"""


def concurrent(text: str) -> str:
    """The top function with a thread for every unit and bounded FIFOs."""
    text, fifos = re.subn(
        r'(hls::stream<\w+> (\w+))\("\2"\);\n#pragma HLS STREAM variable=\2 depth=(\d+)',
        r'\1("\2", \3);',
        text,
    )
    text, units = re.subn(
        r"^ *(qc::[^;]*;)", r"    threads.emplace_back([&] { \1 });", text, flags=re.M
    )
    assert fifos
    assert units
    start, end = text.rindex("#pragma HLS DATAFLOW"), text.rindex("}")
    body = text[start:end].replace("#pragma HLS DATAFLOW", "std::vector<std::thread> threads;", 1)
    join = "for (std::thread &thread : threads) thread.join();\n"
    head = "#include <thread>\n#include <vector>\n"
    return f"{head}{text[:start]}{body}{join}{text[end:]}"


def run(made: Pipeline, graph: Graph, folder: Path, deep: bool) -> str:
    """What the test bench says; without `deep`, forks have no room behind them."""
    codes = feeds(graph, 3)
    images = {k: np.concatenate([c[k] for c in codes])[:3] for k in codes[0]}
    for name, content in cplusplus.emit(made, "net", [images]).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / "shim/hls_stream.h").write_text(BOUNDED)
    top = folder / "firmware/net.cpp"
    text = top.read_text()
    if not deep:
        text = re.sub(r"(variable=\w+_fork_\d+ depth=)\d+", r"\g<1>2", text)
    top.write_text(concurrent(text))
    done = subprocess.run(
        ["make", "csim", "CXXFLAGS=-O0 -pthread"], cwd=folder, capture_output=True, text=True
    )
    assert "error" not in done.stderr.replace("Error 9", ""), done.stderr[:2000]
    return done.stdout


@pytest.mark.parametrize("make", [network, residual])
def test_no_unit_waits_for_ever(make: Callable[[], Graph], tmp_path: Path) -> None:
    graph = make()
    made = folding.solve(graph, Fabric(max_dsp=30)).pipeline
    assert "3 images, 0 mismatching words" in run(made, graph, tmp_path, deep=True)


def test_forks_without_room_are_found(tmp_path: Path) -> None:
    made = folding.solve(residual(), Fabric(max_dsp=30)).pipeline
    assert "stuck: " in run(made, residual(), tmp_path, deep=False)
