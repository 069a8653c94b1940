/* Words in files, for simulation only. With QC_TRACE_STREAMS every stream is written to standard output when it is full.
 */
#ifndef QC_WORDS_H_
#define QC_WORDS_H_

#if defined(QC_TRACE_STREAMS) && !defined(__SYNTHESIS__)
#define QC_TRACE(stream) qc::trace(stream)
#else
#define QC_TRACE(stream)
#endif

#ifndef __SYNTHESIS__

#include <cstddef>
#include <cstdio>
#include <fstream>
#include <string>
#include <vector>

#include "ap_int.h"
#include "hls_stream.h"

namespace qc {

/* A word as hexadecimal digits, as many as its width needs. */
template <int W>
std::string hex(const ap_uint<W> &word) {
    std::string text;
    for (int lo = (W - 1) / 4 * 4; lo >= 0; lo -= 4)
        text += "0123456789abcdef"[word.range(lo + 3 < W ? lo + 3 : W - 1, lo).to_uint()];
    return text;
}

/* The next line of a file of such words; false at its end. */
template <int W>
bool read_hex(std::ifstream &file, ap_uint<W> &word) {
    std::string text;
    if (!(file >> text))
        return false;
    word = 0;
    int lo = 0;
    for (std::size_t i = text.size(); i-- > 0 && lo < W; lo += 4) {
        const unsigned digit = unsigned(text[i] <= '9' ? text[i] - '0' : text[i] - 'a' + 10);
        word.range(lo + 3 < W ? lo + 3 : W - 1, lo) = ap_uint<4>(digit);
    }
    return true;
}

/* A word as bytes, the lowest first. */
template <int W>
void put_bytes(const ap_uint<W> &word) {
    for (int lo = 0; lo < W; lo += 8)
        std::putchar(int(word.range(lo + 7 < W ? lo + 7 : W - 1, lo).to_uint()));
}

template <int W>
bool get_bytes(ap_uint<W> &word) {
    for (int lo = 0; lo < W; lo += 8) {
        const int byte = std::getchar();
        if (byte == EOF)
            return false;
        word.range(lo + 7 < W ? lo + 7 : W - 1, lo) = ap_uint<8>(unsigned(byte));
    }
    return true;
}

/* Write the words of a stream and put them back. */
template <class Word>
void trace(hls::stream<Word> &stream) {
    std::vector<Word> words;
    while (!stream.empty())
        words.push_back(stream.read());
    for (std::size_t i = 0; i < words.size(); i++) {
        put_bytes(words[i]);
        stream.write(words[i]);
    }
}

}  // namespace qc

#endif

#endif
