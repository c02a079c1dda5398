// Sums of products for few rows: a tile of rows times outputs stays in registers, and both sides are read along their
// inputs, as they lie. Included by native_decode.cpp, which says what for.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

// With AVX-512 32 registers of 16 floats, else 16 of 8. Elsewhere this has not been measured, and torch's products stay.
#if defined(__AVX512F__)
constexpr int WIDTH = 16, ROWS = 8;
#else
constexpr int WIDTH = 8, ROWS = 4;
#endif
#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__))
constexpr bool IS_MEASURED = true;
#else
constexpr bool IS_MEASURED = false;
#endif

typedef float Vector __attribute__((vector_size(WIDTH * 4)));
typedef float Unaligned __attribute__((vector_size(WIDTH * 4), aligned(4), may_alias));
typedef int32_t Integers __attribute__((vector_size(WIDTH * 4)));

inline Vector load(const float* at) { return *reinterpret_cast<const Unaligned*>(at); }
inline void store(float* at, Vector value) { *reinterpret_cast<Unaligned*>(at) = value; }
inline Vector all(float value) { return Vector{} + value; }

// a b + c, rounded once. Said, and not left to the compiler, which for some processors multiplies and adds in some tiles.
inline Vector multiply_add(Vector a, Vector b, Vector c) {
#if defined(__AVX512F__)
    return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
    return _mm256_fmadd_ps(a, b, c);
#else
    return a * b + c;
#endif
}

// Compilers would rather load a value anew for each product that it is in.
inline void keep_in_register(Vector& value) {
#if defined(__AVX512F__)
    asm("" : "+v"(value));
#elif defined(__AVX__)
    asm("" : "+x"(value));
#else
    (void)value;
#endif
}

inline float sum(Vector v) {
    float parts[WIDTH];
    store(parts, v);
    for (int step = WIDTH / 2; step > 0; step /= 2)
        for (int i = 0; i < step; ++i) parts[i] += parts[i + step];
    return parts[0];
}

#ifdef __AVX512F__
#define PAIRED(left, right, ...) _mm512_permutex2var_ps(left, _mm512_setr_epi32(__VA_ARGS__), right)

// sum() of eight vectors at once, each by the same tree: lane i with lane i + 8, then i + 4, i + 2, i + 1.
inline __attribute__((always_inline)) void sums(const Vector* v, float* found) {
    Vector a[4], b[2];
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k)
        a[k] = PAIRED(v[2 * k], v[2 * k + 1], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
               PAIRED(v[2 * k], v[2 * k + 1], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
#pragma GCC unroll 2
    for (int k = 0; k < 2; ++k)
        b[k] = PAIRED(a[2 * k], a[2 * k + 1], 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
               PAIRED(a[2 * k], a[2 * k + 1], 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    const Vector c = PAIRED(b[0], b[1], 0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29) +
                     PAIRED(b[0], b[1], 2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31);
    const Vector d = PAIRED(c, c, 0, 2, 4, 6, 8, 10, 12, 14, 0, 2, 4, 6, 8, 10, 12, 14) +
                     PAIRED(c, c, 1, 3, 5, 7, 9, 11, 13, 15, 1, 3, 5, 7, 9, 11, 13, 15);
    std::memcpy(found, &d, 8 * sizeof(float));
}
#else
inline void sums(const Vector* v, float* found) {
    for (int k = 0; k < 8; ++k) found[k] = sum(v[k]);
}
#endif

// e^x by n = round(x / ln 2) and a polynomial of what is left (Cephes' expf: relative error 2e-7).
inline Vector exponential(Vector x) {
    x = x < -87.0f ? all(-87.0f) : x;
    x = x > 88.0f ? all(88.0f) : x;
    const Vector shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the sum's last bits are the rounded integer
    const Vector n = shifted - 12582912.0f;
    const Vector r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    Vector p = all(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const Integers exponent = (__builtin_convertvector(n, Integers) + 127) << 23;
    Vector scale;
    std::memcpy(&scale, &exponent, sizeof scale);
    return p * scale;
}

constexpr int64_t PANEL = 512;         // inputs of a sum that is added to those before it
constexpr int64_t FIRST_CACHE = 6144;  // floats of rows that leave room for a matrix in it

// Outputs that a tile of R rows has beside them: as many as registers hold.
#ifdef __AVX512F__
constexpr int outputs_beside(int rows) { return rows <= 3 ? 8 : rows == 4 ? 6 : rows <= 6 ? 4 : 3; }
#else
constexpr int outputs_beside(int rows) { return rows == 1 ? 8 : rows == 2 ? 4 : rows == 3 ? 3 : 2; }
#endif

// R rows (stride_x apart) times C rows of a matrix: y[r][c] (+)= x[r] . w[c].
template <int R, int C>
inline __attribute__((always_inline)) void tile(const float* x, int64_t stride_x, const float* w, int64_t stride_w,
                                                int64_t inputs, float* y, int64_t stride_y, bool adds) {
    constexpr int EIGHTS = (R * C + 7) / 8;
    Vector total[EIGHTS * 8];
#pragma GCC unroll 32
    for (int i = 0; i < EIGHTS * 8; ++i) total[i] = Vector{};
    const float* ahead = w + 2 * C * stride_w;  // one tile ahead is too late for memory
    for (int64_t k = 0; k < inputs; k += WIDTH) {
        Vector right[C];
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) {
            right[c] = load(w + c * stride_w + k);
            __builtin_prefetch(ahead + c * stride_w + k);
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            Vector left = load(x + r * stride_x + k);
            keep_in_register(left);
#pragma GCC unroll 8
            for (int c = 0; c < C; ++c) total[c * R + r] = multiply_add(left, right[c], total[c * R + r]);
        }
    }
    float found[EIGHTS * 8];
#pragma GCC unroll 4
    for (int eight = 0; eight < EIGHTS; ++eight) sums(total + 8 * eight, found + 8 * eight);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c)
            y[r * stride_y + c] = adds ? y[r * stride_y + c] + found[c * R + r] : found[c * R + r];
}

typedef void (*Products)(const float*, int64_t, const float*, int64_t, int64_t, int64_t, float*, int64_t, bool);

// The same for all outputs.
template <int R>
void panel_of(const float* x, int64_t stride_x, const float* w, int64_t stride_w, int64_t inputs, int64_t outputs,
              float* y, int64_t stride_y, bool adds) {
    constexpr int C = outputs_beside(R);
    int64_t at = 0;
    for (; at + C <= outputs; at += C)
        tile<R, C>(x, stride_x, w + at * stride_w, stride_w, inputs, y + at, stride_y, adds);
    for (; at < outputs; ++at) tile<R, 1>(x, stride_x, w + at * stride_w, stride_w, inputs, y + at, stride_y, adds);
}

// Panel after panel of the inputs, so that the rows, which all outputs read again, stay in the first cache.
template <int R>
void products_of(const float* x, int64_t stride_x, const float* w, int64_t stride_w, int64_t inputs, int64_t outputs,
                 float* y, int64_t stride_y, bool adds) {
    // Few rows stay there whole; then the matrix is read from end to end. Sums are the same.
    const int64_t some = inputs > PANEL && R * inputs <= FIRST_CACHE ? outputs_beside(R) : outputs;
    for (int64_t at = 0; at < outputs; at += some)
        for (int64_t k = 0; k < inputs; k += PANEL)
            panel_of<R>(x + k, stride_x, w + at * stride_w + k, stride_w, inputs - k < PANEL ? inputs - k : PANEL,
                        outputs - at < some ? outputs - at : some, y + at, stride_y, adds || k > 0);
}

#ifdef __AVX512F__
constexpr Products PRODUCTS[ROWS] = {products_of<1>, products_of<2>, products_of<3>, products_of<4>,
                                     products_of<5>, products_of<6>, products_of<7>, products_of<8>};
#else
constexpr Products PRODUCTS[ROWS] = {products_of<1>, products_of<2>, products_of<3>, products_of<4>};
#endif

// y[r][c] (+)= x[r] . w[c] for all rows and some outputs.
void product(const float* x, int64_t stride_x, int64_t rows, const float* w, int64_t stride_w, int64_t inputs,
             int64_t outputs, float* y, int64_t stride_y, bool adds) {
    // As even as can be: 17 rows are 6, 6 and 5, since 8, 8 and 1 would read the matrix for one row once more.
    const int64_t passes = (rows + ROWS - 1) / ROWS;
    for (int64_t pass = 0; pass < passes; ++pass) {
        const int64_t row = rows * pass / passes, count = rows * (pass + 1) / passes - row;
        PRODUCTS[count - 1](x + row * stride_x, stride_x, w, stride_w, inputs, outputs, y + row * stride_y, stride_y,
                            adds);
    }
}

// C * WIDTH columns of R mixtures of values, of which shares[r][p] are the parts.
template <int R, int C>
void mixture(const float* shares, int64_t stride, int64_t places, const float* values, int64_t width,
             const float* factors, float* const* targets, int64_t column) {
    Vector total[R][C] = {};
    for (int64_t p = 0; p < places; ++p) {
        Vector value[C];
        for (int c = 0; c < C; ++c) value[c] = load(values + p * width + column + c * WIDTH);
        for (int r = 0; r < R; ++r) {
            const float share = shares[r * stride + p];
            for (int c = 0; c < C; ++c) total[r][c] = multiply_add(value[c], all(share), total[r][c]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) store(targets[r] + column + c * WIDTH, total[r][c] * factors[r]);
}

typedef void (*Mixture)(const float*, int64_t, int64_t, const float*, int64_t, const float*, float* const*, int64_t);

struct Mixtures {
    int64_t columns;
    Mixture wide, narrow;  // of so many columns, or of WIDTH
};

template <int R>
constexpr Mixtures mixtures_of() {
#ifdef __AVX512F__
    constexpr int C = R > 6 ? 2 : 4;
#else
    constexpr int C = R > 2 ? 2 : 4;
#endif
    return {C * WIDTH, mixture<R, C>, mixture<R, 1>};
}

#ifdef __AVX512F__
constexpr Mixtures MIXTURES[ROWS] = {mixtures_of<1>(), mixtures_of<2>(), mixtures_of<3>(), mixtures_of<4>(),
                                     mixtures_of<5>(), mixtures_of<6>(), mixtures_of<7>(), mixtures_of<8>()};
#else
constexpr Mixtures MIXTURES[ROWS] = {mixtures_of<1>(), mixtures_of<2>(), mixtures_of<3>(), mixtures_of<4>()};
#endif

}  // namespace
