/* Streaming units of a quantized network.
 *
 * Each unit is a function of streams and of a configuration class C that holds its sizes, constants and number types;
 * the configurations of a network are in parameters.h. A unit reads and writes every word of one image. A word carries
 * `lanes` elements, the first one in the lowest bits. Everything is as wide as it needs to be and no wider, positions
 * are counters: there is no division, no remainder and no rounding but those that the network itself asks for.
 */
#ifndef QC_KERNELS_H_
#define QC_KERNELS_H_

#include "ap_int.h"
#include "hls_stream.h"

namespace qc {

/* What a constant table holds: the numbers themselves, in a simulation plain integers and literals of wide words, which
 * a compiler need not construct one by one.
 */
template <class T, bool Wide = (T::width > 64)>
struct rom {
#ifdef __SYNTHESIS__
    typedef T type;
#else
    typedef long long type;
#endif
};

template <class T>
struct rom<T, true> {
#ifdef __SYNTHESIS__
    typedef T type;
#else
    typedef const char *type;
#endif
};

/* Element i of a word. */
template <class T, int W>
T lane(const ap_uint<W> &word, int i) {
#pragma HLS INLINE
    T x;
    x.range(T::width - 1, 0) = word.range((i + 1) * T::width - 1, i * T::width);
    return x;
}

template <int W, class T>
void set_lane(ap_uint<W> &word, int i, const T &x) {
#pragma HLS INLINE
    word.range((i + 1) * T::width - 1, i * T::width) = x.range(T::width - 1, 0);
}

/* For each output pixel the words under the kernel, from a ring of rows that is as long as one row of outputs needs and
 * the rows that arrive meanwhile. Words outside the image are `fill` in every lane.
 */
template <class C, class Word>
void window(hls::stream<Word> &in, hls::stream<Word> &out) {
    Word ring[C::ring_words];
#pragma HLS DEPENDENCE variable=ring inter false
    Word fill = 0;
    for (int i = 0; i < C::lanes; i++) {
#pragma HLS UNROLL
        set_lane(fill, i, ap_uint<C::bits>(C::fill));
    }

    int write_at = 0;
    for (int i = 0; i < C::first_rows * C::row_words; i++) {
#pragma HLS PIPELINE II=1
        ring[write_at] = in.read();
        write_at = write_at + 1 == C::ring_words ? 0 : write_at + 1;
    }

    int have = C::first_rows;
    int top = -C::pad_top;
    int top_at = C::first_top;
    for (int row = 0; row < C::out_height; row++) {
#pragma HLS LOOP_FLATTEN off
        /* rows that the next row of outputs reaches; the last one leaves none unread */
        int reach = top + C::stride_height + C::below + 1;
        if (reach > C::height || row == C::out_height - 1)
            reach = C::height;
        if (reach < have)
            reach = have;
        const int reads = (reach - have) * C::row_words;
        have = reach;

        int y = top, y_at = top_at;
        int left = -C::pad_left, left_at = -C::pad_left * C::folds;
        int x = left, x_at = left_at;
        int fold = 0, tap_x = 0, tap_y = 0;
        for (int i = 0; i < C::row_steps; i++) {
#pragma HLS PIPELINE II=1
            if (i < reads) {
                ring[write_at] = in.read();
                write_at = write_at + 1 == C::ring_words ? 0 : write_at + 1;
            }
            if (i < C::out_row_words) {
                Word word = fill;
                if (y >= 0 && y < C::height && x >= 0 && x < C::width)
                    word = ring[y_at + x_at + fold];
                out.write(word);

                const bool last_fold = fold == C::folds - 1;
                const bool last_x = tap_x == C::kernel_width - 1;
                const bool last_y = tap_y == C::kernel_height - 1;
                const bool next_tap = C::by_channel || last_fold;
                const bool next_fold = !C::by_channel || (last_x && last_y);
                if (next_tap) {
                    if (!last_x) {
                        tap_x++;
                        x += C::dilation_width;
                        x_at += C::dilation_width * C::folds;
                    } else {
                        tap_x = 0;
                        if (!last_y) {
                            tap_y++;
                            y += C::dilation_height;
                            y_at += C::dilation_at;
                            if (y_at >= C::ring_words)
                                y_at -= C::ring_words;
                        } else {
                            tap_y = 0;
                            y = top;
                            y_at = top_at;
                            if (last_fold) {
                                left += C::stride_width;
                                left_at += C::stride_width * C::folds;
                            }
                        }
                        x = left;
                        x_at = left_at;
                    }
                }
                if (next_fold)
                    fold = last_fold ? 0 : fold + 1;
            }
        }
        top += C::stride_height;
        top_at += C::stride_at;
        if (top_at >= C::ring_words)
            top_at -= C::ring_words;
    }
}

/* Matrix times vector: `lanes` results at once, `simd` products in each; the vector's words are read once and kept. */
template <class C, class In, class Out, class... Values>
void matrix_vector(hls::stream<In> &in, hls::stream<Out> &out, hls::stream<Values> &... values) {
    In vector[C::steps];
    typename C::acc_t acc[C::lanes];
#pragma HLS ARRAY_PARTITION variable=acc complete
    int step = 0, group = 0, pixel = 0, at = 0;
    for (int i = 0; i < C::pixels * C::groups * C::steps; i++) {
#pragma HLS PIPELINE II=1
        In word;
        if (group == 0) {
            word = in.read();
            vector[step] = word;
        } else {
            word = vector[step];
        }
        for (int lane = 0; lane < C::lanes; lane++) {
#pragma HLS UNROLL
            const ap_uint<C::simd * C::w_t::width> weights = C::weights(lane, at);
            typename C::acc_t sum = 0;
            for (int s = 0; s < C::simd; s++) {
#pragma HLS UNROLL
                sum += qc::lane<typename C::x_t>(word, s) * qc::lane<typename C::w_t>(weights, s);
            }
            const typename C::acc_t before = step == 0 ? typename C::acc_t(C::bias(lane, group)) : acc[lane];
            acc[lane] = before + sum;
        }
        at++;
        if (++step == C::steps) {
            step = 0;
            out.write(C::finish(group, pixel, acc, values.read()...));
            if (++group == C::groups) {
                group = 0;
                at = 0;
                pixel++;
            }
        }
    }
}

/* Every channel's taps times its own weights. */
template <class C, class In, class Out, class... Values>
void depthwise(hls::stream<In> &in, hls::stream<Out> &out, hls::stream<Values> &... values) {
    typename C::acc_t acc[C::lanes];
#pragma HLS ARRAY_PARTITION variable=acc complete
    int tap = 0, group = 0, pixel = 0, at = 0;
    for (int i = 0; i < C::pixels * C::groups * C::taps; i++) {
#pragma HLS PIPELINE II=1
        const In word = in.read();
        for (int lane = 0; lane < C::lanes; lane++) {
#pragma HLS UNROLL
            const typename C::acc_t before = tap == 0 ? typename C::acc_t(C::bias(lane, group)) : acc[lane];
            acc[lane] = before + qc::lane<typename C::x_t>(word, lane) * C::weight(lane, at);
        }
        at++;
        if (++tap == C::taps) {
            tap = 0;
            out.write(C::finish(group, pixel, acc, values.read()...));
            if (++group == C::groups) {
                group = 0;
                at = 0;
                pixel++;
            }
        }
    }
}

/* The sum over every channel's taps, each less the zero point. */
template <class C, class In, class Out, class... Values>
void sum_pool(hls::stream<In> &in, hls::stream<Out> &out, hls::stream<Values> &... values) {
    typename C::acc_t acc[C::lanes];
#pragma HLS ARRAY_PARTITION variable=acc complete
    int tap = 0, group = 0, pixel = 0;
    for (int i = 0; i < C::pixels * C::groups * C::taps; i++) {
#pragma HLS PIPELINE II=1
        const In word = in.read();
        for (int lane = 0; lane < C::lanes; lane++) {
#pragma HLS UNROLL
            const typename C::acc_t before = tap == 0 ? typename C::acc_t(0) : acc[lane];
            acc[lane] = before + (qc::lane<typename C::x_t>(word, lane) - typename C::zero_t(C::zero));
        }
        if (++tap == C::taps) {
            tap = 0;
            out.write(C::finish(group, pixel, acc, values.read()...));
            if (++group == C::groups) {
                group = 0;
                pixel++;
            }
        }
    }
}

/* The sum of every channel over all pixels, each element less the zero point. */
template <class C, class In, class Out, class... Values>
void global_sum(hls::stream<In> &in, hls::stream<Out> &out, hls::stream<Values> &... values) {
    typename C::acc_t sums[C::groups][C::lanes];
#pragma HLS ARRAY_PARTITION variable=sums complete dim=0
    int group = 0, pixel = 0;
    for (int i = 0; i < C::pixels * C::groups; i++) {
#pragma HLS PIPELINE II=1
        const In word = in.read();
        typename C::acc_t acc[C::lanes];
#pragma HLS ARRAY_PARTITION variable=acc complete
        for (int lane = 0; lane < C::lanes; lane++) {
#pragma HLS UNROLL
            const typename C::acc_t before = pixel == 0 ? typename C::acc_t(0) : sums[group][lane];
            acc[lane] = before + (qc::lane<typename C::x_t>(word, lane) - typename C::zero_t(C::zero));
            sums[group][lane] = acc[lane];
        }
        if (pixel == C::pixels - 1)
            out.write(C::finish(group, 0, acc, values.read()...));
        if (++group == C::groups) {
            group = 0;
            pixel++;
        }
    }
}

/* The largest of every channel's taps. */
template <class C, class Word>
void max_pool(hls::stream<Word> &in, hls::stream<Word> &out) {
    Word most = 0;
    int tap = 0;
    for (int i = 0; i < C::words * C::taps; i++) {
#pragma HLS PIPELINE II=1
        Word word = in.read();
        for (int lane = 0; lane < C::lanes; lane++) {
#pragma HLS UNROLL
            const typename C::x_t before = qc::lane<typename C::x_t>(most, lane);
            if (tap > 0 && before > qc::lane<typename C::x_t>(word, lane))
                set_lane(word, lane, before);
        }
        most = word;
        if (++tap == C::taps) {
            tap = 0;
            out.write(most);
        }
    }
}

/* A function of one word of each input. */
template <class C, class Out, class... Ins>
void elementwise(hls::stream<Out> &out, hls::stream<Ins> &... ins) {
    int group = 0, pixel = 0;
    for (int i = 0; i < C::pixels * C::groups; i++) {
#pragma HLS PIPELINE II=1
        out.write(C::apply(group, pixel, ins.read()...));
        if (++group == C::groups) {
            group = 0;
            pixel++;
        }
    }
}

/* The entry of a table for every element; the lowest code has the first one. */
template <class C, class In, class Out>
void table(hls::stream<In> &in, hls::stream<Out> &out) {
    for (int i = 0; i < C::words; i++) {
#pragma HLS PIPELINE II=1
        const In word = in.read();
        Out result = 0;
        for (int lane = 0; lane < C::lanes; lane++) {
#pragma HLS UNROLL
            const int code = qc::lane<typename C::x_t>(word, lane).to_int();
            set_lane(result, lane, C::entry(lane, code - C::lowest));
        }
        out.write(result);
    }
}

template <class Word>
Word read_part(int, hls::stream<Word> &last) {
#pragma HLS INLINE
    return last.read();
}

template <class Word, class... Others>
Word read_part(int part, hls::stream<Word> &first, Others &... others) {
#pragma HLS INLINE
    if (part == 0)
        return first.read();
    return read_part(part - 1, others...);
}

/* For each pixel the words of the first input, then those of the second, and so on. */
template <class C, class Word, class... Ins>
void concat(hls::stream<Word> &out, hls::stream<Ins> &... ins) {
    int part = 0, fold = 0;
    for (int i = 0; i < C::words; i++) {
#pragma HLS PIPELINE II=1
        out.write(read_part(part, ins...));
        if (++fold == C::folds(part)) {
            fold = 0;
            part = part + 1 == C::parts ? 0 : part + 1;
        }
    }
}

/* For each pixel words of fill, the words of the input, words of fill. */
template <class C, class Word>
void pad_channels(hls::stream<Word> &in, hls::stream<Word> &out) {
    Word fill = 0;
    for (int i = 0; i < C::lanes; i++) {
#pragma HLS UNROLL
        set_lane(fill, i, ap_uint<C::bits>(C::fill));
    }
    int at = 0;
    for (int i = 0; i < C::pixels * (C::before + C::words + C::after); i++) {
#pragma HLS PIPELINE II=1
        out.write(at >= C::before && at < C::before + C::words ? in.read() : fill);
        at = at + 1 == C::before + C::words + C::after ? 0 : at + 1;
    }
}

template <class Word>
void write_all(const Word &) {
#pragma HLS INLINE
}

template <class Word, class... Others>
void write_all(const Word &word, hls::stream<Word> &first, Others &... others) {
#pragma HLS INLINE
    first.write(word);
    write_all(word, others...);
}

/* The same words into every output. */
template <class C, class Word, class... Outs>
void fork(hls::stream<Word> &in, hls::stream<Outs> &... outs) {
    for (int i = 0; i < C::words; i++) {
#pragma HLS PIPELINE II=1
        write_all(in.read(), outs...);
    }
}

/* `ratio` words become one. */
template <class C, class In, class Out>
void widen(hls::stream<In> &in, hls::stream<Out> &out) {
    Out word = 0;
    int part = 0;
    for (int i = 0; i < C::words; i++) {
#pragma HLS PIPELINE II=1
        word = word >> In::width;
        word.range(Out::width - 1, Out::width - In::width) = in.read().range(In::width - 1, 0);
        if (++part == C::ratio) {
            part = 0;
            out.write(word);
        }
    }
}

/* One word becomes `ratio`. */
template <class C, class In, class Out>
void narrow(hls::stream<In> &in, hls::stream<Out> &out) {
    In word = 0;
    int part = 0;
    for (int i = 0; i < C::words; i++) {
#pragma HLS PIPELINE II=1
        if (part == 0)
            word = in.read();
        Out piece;
        piece.range(Out::width - 1, 0) = word.range(Out::width - 1, 0);
        out.write(piece);
        word = word >> Out::width;
        part = part + 1 == C::ratio ? 0 : part + 1;
    }
}

/* Softmax over the channels of a pixel, one element a word: exponentials by table, one Newton reciprocal, one rounding.
 */
template <class C, class In, class Out>
void softmax(hls::stream<In> &in, hls::stream<Out> &out) {
    typename C::x_t codes[C::channels];
    for (int pixel = 0; pixel < C::pixels; pixel++) {
        typename C::x_t most = C::lowest;
        for (int c = 0; c < C::channels; c++) {
#pragma HLS PIPELINE II=1
            codes[c] = lane<typename C::x_t>(in.read(), 0);
            if (codes[c] > most)
                most = codes[c];
        }
        ap_uint<31> total = 0;
        for (int c = 0; c < C::channels; c++) {
#pragma HLS PIPELINE II=1
            total += C::exponential((most - codes[c]).to_int());
        }
        ap_uint<31> scaled = total;
        ap_uint<5> top = 30;
        for (int i = 0; i < 30; i++) {
#pragma HLS PIPELINE II=1
            if (scaled < ap_uint<31>(1 << 30)) {
                scaled = scaled << 1;
                top -= 1;
            }
        }
        /* inverse ~ 2**61 / scaled, in 2**30..2**31 */
        ap_int<33> inverse = ap_int<33>(C::line_constant) - ((scaled * ap_uint<31>(C::line_slope)) >> 31);
        for (int i = 0; i < C::newton_steps; i++) {
            /* the start is off by less than 1/17, so the error keeps below 2**28 */
            const ap_int<31> error = ap_uint<32>(1u << 31) - ((scaled * inverse) >> 30);
            inverse += (inverse * error) >> 31;
        }
        const int shift = C::shift + top.to_int();
        for (int c = 0; c < C::channels; c++) {
#pragma HLS PIPELINE II=1
            ap_int<64> y = C::exponential((most - codes[c]).to_int()) * inverse;
            y += ap_int<64>(1) << (shift - 1);
            y = (y >> shift) + ap_int<64>(C::y_lo);
            if (y < C::y_lo)
                y = C::y_lo;
            if (y > C::y_hi)
                y = C::y_hi;
            Out word = 0;
            set_lane(word, 0, typename C::y_t(y));
            out.write(word);
        }
    }
}

}  // namespace qc

#endif
