/* hls::stream for C simulation: an unbounded queue. Reading an empty one, and leaving words in one, stop the program. */
#ifndef QC_SHIM_HLS_STREAM_H_
#define QC_SHIM_HLS_STREAM_H_

#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <deque>

namespace hls {

template <class T, int Depth = 0>
class stream {
public:
    explicit stream(const char *name = "stream") : name_(name) {}
    stream(const stream &) = delete;
    stream &operator=(const stream &) = delete;
    ~stream() {
        if (!words_.empty())
            fail("has words left that nobody read");
    }

    bool empty() const { return words_.empty(); }
    bool full() const { return false; }
    std::size_t size() const { return words_.size(); }

    T read() {
        if (words_.empty())
            fail("is read while it is empty");
        T word = words_.front();
        words_.pop_front();
        return word;
    }
    void read(T &word) { word = read(); }
    bool read_nb(T &word) {
        if (words_.empty())
            return false;
        word = read();
        return true;
    }
    void write(const T &word) { words_.push_back(word); }
    bool write_nb(const T &word) {
        write(word);
        return true;
    }
    void operator>>(T &word) { word = read(); }
    void operator<<(const T &word) { write(word); }

private:
    void fail(const char *what) const {
        std::fprintf(stderr, "hls::stream: %s %s\n", name_, what);
        std::exit(1);
    }

    const char *name_;
    std::deque<T> words_;
};

}  // namespace hls

#endif
