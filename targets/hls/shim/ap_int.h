/* Integers of any width for C simulation: the part of the usual ap_int.h that the emitted sources use.
 *
 * ap_int<W> and ap_uint<W> wrap where they are assigned; results of operators are as wide as they need to be. Up to 64
 * bits are one machine word, more are an array of 32-bit limbs. Nothing here is undefined for any operand, except
 * shifts by a negative amount and ranges outside a number, which stop the program.
 */
#ifndef QC_SHIM_AP_INT_H_
#define QC_SHIM_AP_INT_H_

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <type_traits>

namespace qc_shim {

inline void require(bool holds, const char *what) {
    if (!holds) {
        std::fprintf(stderr, "ap_int: %s\n", what);
        std::abort();
    }
}

constexpr int larger(int a, int b) { return a > b ? a : b; }
constexpr int limbs(int width) { return (width + 31) / 32; }

/* The lowest n of 64 bits, n in 0..64. */
constexpr std::uint64_t low(std::uint64_t x, int n) { return n >= 64 ? x : x & ((std::uint64_t(1) << n) - 1); }

/* The lowest n of 64 bits as a two's complement number, n in 1..64. */
constexpr std::int64_t extended(std::uint64_t x, int n) { return std::int64_t(x << (64 - n)) >> (64 - n); }

template <int W, bool S, bool Wide = (W > 64)>
class number;

/* Bits hi..lo of a number, to be read and, where it is not constant, written. */
template <class N>
class slice {
public:
    slice(N &number, int hi, int lo) : number_(number), lo_(lo), width_(hi - lo + 1) {
        require(lo >= 0 && hi >= lo && hi < N::width, "a range lies outside its number");
    }
    slice(const slice &) = default;

    int length() const { return width_; }

    /* At most 64 bits from bit `at` of the slice on; zeros beyond it. */
    std::uint64_t field(int at, int n) const {
        const int there = width_ - at < n ? width_ - at : n;
        return there <= 0 ? 0 : number_.field(lo_ + at, there);
    }

    template <int W2, bool S2, bool X2>
    slice &operator=(const number<W2, S2, X2> &x) {
        for (int at = 0; at < width_; at += 32)
            number_.set_field(lo_ + at, width_ - at < 32 ? width_ - at : 32, x.limb(at / 32));
        return *this;
    }
    template <class N2>
    slice &operator=(const slice<N2> &x) {
        return *this = number<N2::width, false>(x);
    }
    slice &operator=(const slice &x) { return *this = number<N::width, false>(x); }
    template <class T, class = typename std::enable_if<std::is_integral<T>::value>::type>
    slice &operator=(T x) {
        return *this = number<64, std::is_signed<T>::value>(x);
    }

    std::uint64_t to_uint64() const { return field(0, 64); }
    unsigned to_uint() const { return unsigned(field(0, 32)); }
    int to_int() const { return int(to_uint()); }

private:
    N &number_;
    int lo_, width_;
};

/* Up to 64 bits, kept extended to 64. */
template <int W, bool S>
class number<W, S, false> {
    static_assert(W > 0, "a number has bits");

public:
    static const int width = W;

    constexpr number() : bits_(0) {}
    template <class T, class = typename std::enable_if<std::is_integral<T>::value>::type>
    constexpr number(T x) : bits_(wrapped(std::uint64_t(x))) {}
    template <int W2, bool S2, bool X2>
    constexpr number(const number<W2, S2, X2> &x) : bits_(wrapped(x.low64())) {}
    template <class N>
    number(const slice<N> &x) : bits_(wrapped(x.to_uint64())) {}

    constexpr std::uint64_t low64() const { return bits_; }
    constexpr bool negative() const { return S && (bits_ >> 63) != 0; }
    std::uint32_t limb(int i) const {
        return i < 2 ? std::uint32_t(bits_ >> (32 * i)) : negative() ? 0xffffffffu : 0u;
    }
    std::uint64_t field(int lo, int n) const { return low(bits_ >> lo, n); }
    void set_field(int lo, int n, std::uint64_t x) {
        const std::uint64_t mask = low(~std::uint64_t(0), n) << lo;
        bits_ = wrapped((bits_ & ~mask) | ((x << lo) & mask));
    }

    slice<number> range(int hi, int lo) { return slice<number>(*this, hi, lo); }
    slice<const number> range(int hi, int lo) const { return slice<const number>(*this, hi, lo); }

    std::int64_t to_int64() const { return std::int64_t(bits_); }
    std::uint64_t to_uint64() const { return bits_; }
    int to_int() const { return int(std::uint32_t(bits_)); }
    unsigned to_uint() const { return unsigned(bits_); }

    number operator>>(int n) const {
        require(n >= 0, "a shift by a negative amount");
        if (n > 63)
            return negative() ? number(-1) : number(0);
        return S ? number(std::int64_t(bits_) >> n) : number(bits_ >> n);
    }
    number operator<<(int n) const {
        require(n >= 0, "a shift by a negative amount");
        return n > 63 ? number(0) : number(bits_ << n);
    }

private:
    static constexpr std::uint64_t wrapped(std::uint64_t x) {
        return S ? std::uint64_t(extended(x, W)) : low(x, W);
    }

    std::uint64_t bits_;
};

/* More than 64 bits, the last limb kept extended. */
template <int W, bool S>
class number<W, S, true> {
public:
    static const int width = W;
    static const int size = limbs(W);

    number() : limb_() {}
    template <class T, class = typename std::enable_if<std::is_integral<T>::value>::type>
    number(T x) : number(number<64, std::is_signed<T>::value>(x)) {}
    template <int W2, bool S2, bool X2>
    number(const number<W2, S2, X2> &x) {
        for (int i = 0; i < size; i++)
            limb_[i] = x.limb(i);
        wrap();
    }
    template <class N>
    number(const slice<N> &x) {
        for (int i = 0; i < size; i++)
            limb_[i] = std::uint32_t(x.field(32 * i, 32));
        wrap();
    }
    number(const number &) = default;
    number &operator=(const number &) = default;

    std::uint64_t low64() const { return (std::uint64_t(limb_[1]) << 32) | limb_[0]; }
    bool negative() const { return S && (limb_[size - 1] >> 31) != 0; }
    std::uint32_t limb(int i) const { return i < size ? limb_[i] : negative() ? 0xffffffffu : 0u; }
    void set_limb(int i, std::uint32_t x) { limb_[i] = x; }
    void wrap() {
        const int top = W - 32 * (size - 1);
        limb_[size - 1] = std::uint32_t(S ? std::uint64_t(extended(limb_[size - 1], top)) : low(limb_[size - 1], top));
    }
    std::uint64_t field(int lo, int n) const {
        std::uint64_t x = 0;
        for (int i = lo / 32, at = -(lo % 32); at < n; i++, at += 32)
            x |= at < 0 ? std::uint64_t(limb(i)) >> -at : std::uint64_t(limb(i)) << at;
        return low(x, n);
    }
    void set_field(int lo, int n, std::uint64_t x) {
        for (int i = lo / 32, at = -(lo % 32); at < n; i++, at += 32) {
            const int from = at < 0 ? -at : 0;
            const int left = n - (at < 0 ? 0 : at);
            const int count = left < 32 - from ? left : 32 - from;
            const std::uint64_t mask = low(~std::uint64_t(0), count) << from;
            const std::uint64_t part = (at < 0 ? x : x >> at) << from;
            limb_[i] = std::uint32_t((limb_[i] & ~mask) | (part & mask));
        }
        wrap();
    }

    slice<number> range(int hi, int lo) { return slice<number>(*this, hi, lo); }
    slice<const number> range(int hi, int lo) const { return slice<const number>(*this, hi, lo); }

    std::int64_t to_int64() const { return std::int64_t(low64()); }
    std::uint64_t to_uint64() const { return low64(); }
    int to_int() const { return int(limb_[0]); }
    unsigned to_uint() const { return limb_[0]; }

    number operator>>(int n) const {
        require(n >= 0, "a shift by a negative amount");
        number y;
        for (int i = 0; i < size; i++) {
            const std::uint64_t pair = (std::uint64_t(limb(i + n / 32 + 1)) << 32) | limb(i + n / 32);
            y.limb_[i] = std::uint32_t(pair >> (n % 32));
        }
        y.wrap();
        return y;
    }
    number operator<<(int n) const {
        require(n >= 0, "a shift by a negative amount");
        number y;
        for (int i = size - 1; i >= n / 32; i--) {
            const int from = i - n / 32;
            const std::uint64_t pair = (std::uint64_t(limb_[from]) << 32) | (from > 0 ? limb_[from - 1] : 0u);
            y.limb_[i] = std::uint32_t(pair >> (32 - n % 32));
        }
        y.wrap();
        return y;
    }

private:
    std::uint32_t limb_[size];
};

/* Arithmetic in a result type R that holds the result. */
template <class R, bool Wide = (R::width > 64)>
struct in {
    template <class A, class B>
    static R sum(const A &a, const B &b) {
        return R(a.low64() + b.low64());
    }
    template <class A, class B>
    static R difference(const A &a, const B &b) {
        return R(a.low64() - b.low64());
    }
    template <class A, class B>
    static R product(const A &a, const B &b) {
        return R(a.low64() * b.low64());
    }
};

template <class R>
struct in<R, true> {
    template <class A, class B>
    static R sum(const A &a, const B &b) {
        R y;
        std::uint64_t carry = 0;
        for (int i = 0; i < R::size; i++) {
            carry += std::uint64_t(a.limb(i)) + b.limb(i);
            y.set_limb(i, std::uint32_t(carry));
            carry >>= 32;
        }
        y.wrap();
        return y;
    }
    template <class A, class B>
    static R difference(const A &a, const B &b) {
        R y;
        std::uint64_t carry = 1;
        for (int i = 0; i < R::size; i++) {
            carry += std::uint64_t(a.limb(i)) + std::uint32_t(~b.limb(i));
            y.set_limb(i, std::uint32_t(carry));
            carry >>= 32;
        }
        y.wrap();
        return y;
    }
    template <class A, class B>
    static R product(const A &a, const B &b) {
        R y;
        for (int i = 0; i < R::size; i++) {
            std::uint64_t carry = 0;
            for (int j = 0; i + j < R::size; j++) {
                carry += std::uint64_t(a.limb(i)) * b.limb(j) + y.limb(i + j);
                y.set_limb(i + j, std::uint32_t(carry));
                carry >>= 32;
            }
        }
        y.wrap();
        return y;
    }
};

/* -1, 0 or 1. */
template <int W1, bool S1, bool X1, int W2, bool S2, bool X2>
int compared(const number<W1, S1, X1> &a, const number<W2, S2, X2> &b) {
    if (a.negative() != b.negative())
        return a.negative() ? -1 : 1;
    if (!X1 && !X2)
        return a.low64() < b.low64() ? -1 : a.low64() > b.low64();
    for (int i = limbs(larger(W1, W2)); i >= 0; i--)
        if (a.limb(i) != b.limb(i))
            return a.limb(i) < b.limb(i) ? -1 : 1;
    return 0;
}

/* The number that an integer of the language is. */
template <class T>
using native = typename std::enable_if<std::is_integral<T>::value, number<8 * int(sizeof(T)), std::is_signed<T>::value>>::type;

#define QC_SHIM_ARITHMETIC(op, function, result_width, result_signed)                               \
    template <int W1, bool S1, bool X1, int W2, bool S2, bool X2>                                   \
    number<(result_width), (result_signed)> operator op(const number<W1, S1, X1> &a,                \
                                                        const number<W2, S2, X2> &b) {              \
        return in<number<(result_width), (result_signed)>>::function(a, b);                         \
    }                                                                                               \
    template <int W1, bool S1, bool X1, class T, class N = native<T>>                               \
    auto operator op(const number<W1, S1, X1> &a, T b)->decltype(a op N(b)) {                       \
        return a op N(b);                                                                           \
    }                                                                                               \
    template <int W1, bool S1, bool X1, class T, class N = native<T>>                               \
    auto operator op(T a, const number<W1, S1, X1> &b)->decltype(N(a) op b) {                       \
        return N(a) op b;                                                                           \
    }

QC_SHIM_ARITHMETIC(+, sum, (larger(W1 + (S2 && !S1), W2 + (S1 && !S2)) + 1), (S1 || S2))
QC_SHIM_ARITHMETIC(-, difference, (larger(W1 + (S2 && !S1), W2 + (S1 && !S2)) + 1), true)
QC_SHIM_ARITHMETIC(*, product, (W1 + W2), (S1 || S2))
#undef QC_SHIM_ARITHMETIC

#define QC_SHIM_COMPARISON(op)                                                                      \
    template <int W1, bool S1, bool X1, int W2, bool S2, bool X2>                                   \
    bool operator op(const number<W1, S1, X1> &a, const number<W2, S2, X2> &b) {                    \
        return compared(a, b) op 0;                                                                 \
    }                                                                                               \
    template <int W1, bool S1, bool X1, class T, class N = native<T>>                               \
    bool operator op(const number<W1, S1, X1> &a, T b) {                                            \
        return compared(a, N(b)) op 0;                                                              \
    }                                                                                               \
    template <int W1, bool S1, bool X1, class T, class N = native<T>>                               \
    bool operator op(T a, const number<W1, S1, X1> &b) {                                            \
        return compared(N(a), b) op 0;                                                              \
    }

QC_SHIM_COMPARISON(<)
QC_SHIM_COMPARISON(<=)
QC_SHIM_COMPARISON(>)
QC_SHIM_COMPARISON(>=)
QC_SHIM_COMPARISON(==)
QC_SHIM_COMPARISON(!=)
#undef QC_SHIM_COMPARISON

template <int W, bool S, bool X>
number<W + 1, true> operator-(const number<W, S, X> &a) {
    return number<1, false>(0) - a;
}

/* Digits of base 16 after 0x, of base 10 otherwise, with or without a sign. */
template <class N>
N parsed(const char *text) {
    const bool minus = *text == '-';
    text += minus || *text == '+';
    const bool hex = text[0] == '0' && (text[1] == 'x' || text[1] == 'X');
    text += hex ? 2 : 0;
    require(*text != '\0', "a literal without digits");
    number<N::width, false> y;
    int lo = 0;
    for (const char *t = text; *t; t++)
        lo += 4;
    for (; *text; text++) {
        const char c = *text;
        const int digit = c >= '0' && c <= '9'   ? c - '0'
                          : c >= 'a' && c <= 'f' ? c - 'a' + 10
                          : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                                 : 16;
        require(digit < (hex ? 16 : 10), "a character that is no digit");
        lo -= 4;
        if (!hex)
            y = number<N::width, false>(y * number<4, false>(10) + number<4, false>(digit));
        else if (lo < N::width)
            y.set_field(lo, N::width - lo < 4 ? N::width - lo : 4, std::uint64_t(digit));
    }
    return minus ? N(-y) : N(y);
}

/* Assignment forms and constructors of a public type T with the digits of N. */
#define QC_SHIM_PUBLIC(T, S)                                                                        \
    template <int W>                                                                                \
    class T : public qc_shim::number<W, S> {                                                        \
        typedef qc_shim::number<W, S> base;                                                         \
                                                                                                    \
    public:                                                                                         \
        constexpr T() : base() {}                                                                   \
        template <class X, class = typename std::enable_if<std::is_integral<X>::value>::type>       \
        constexpr T(X x) : base(x) {}                                                               \
        template <int W2, bool S2, bool X2>                                                         \
        constexpr T(const qc_shim::number<W2, S2, X2> &x) : base(x) {}                              \
        template <class N>                                                                          \
        T(const qc_shim::slice<N> &x) : base(x) {}                                                  \
        T(const char *text) : base(qc_shim::parsed<base>(text)) {}                                  \
                                                                                                    \
        template <class X>                                                                          \
        T &operator+=(const X &x) {                                                                 \
            return *this = T(*this + x);                                                            \
        }                                                                                           \
        template <class X>                                                                          \
        T &operator-=(const X &x) {                                                                 \
            return *this = T(*this - x);                                                            \
        }                                                                                           \
        template <class X>                                                                          \
        T &operator*=(const X &x) {                                                                 \
            return *this = T(*this * x);                                                            \
        }                                                                                           \
        T &operator>>=(int n) { return *this = T(*this >> n); }                                     \
        T &operator<<=(int n) { return *this = T(*this << n); }                                     \
    };

}  // namespace qc_shim

QC_SHIM_PUBLIC(ap_int, true)
QC_SHIM_PUBLIC(ap_uint, false)
#undef QC_SHIM_PUBLIC

#endif
