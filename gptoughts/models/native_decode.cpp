// A few tokens of each row through a dense decoder, in one call: what models/native_decode.py hands its pointers to.
//
// At few rows a product's time is that of reading the matrix. Libraries read it in one pass for one row only; of some
// eight rows their products take twice that and more. Here a tile of rows times outputs stays in registers, both sides
// are read along their inputs, as they lie, and what is between two products costs no call.
//
// A sum is always taken in the same order: WIDTH partial sums along the inputs, then a tree. So a row's numbers do not
// depend on which rows are beside it, nor on the number of threads.
//
// Legend: n rows (tokens of all sequences), h hidden, i inputs, o outputs, q query heads of a key/value head, p places.

#include <omp.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "native_tiles.h"

namespace {

constexpr int64_t CHUNK = 48;  // outputs whose matrix rows stay in the cache while all rows pass by; whole vectors
constexpr int64_t GRAIN = 24;  // outputs that threads are given at once: a multiple of what tiles have
constexpr int64_t KEYS = 64;   // places whose scores are computed at once
constexpr int64_t MOST_HEAD_DIM = 512;

// The thread's part of so many units, in multiples of a grain.
struct Part {
    int64_t begin, end;
    Part(int64_t count, int64_t grain, int thread, int threads) {
        const int64_t grains = (count + grain - 1) / grain;
        begin = grains * thread / threads * grain;
        end = grains * (thread + 1) / threads * grain;
        if (end > count) end = count;
        if (begin > end) begin = end;
    }
};

void whole_product(const float* x, int64_t rows, const float* w, int64_t inputs, int64_t outputs, float* y, bool adds,
                   int thread, int threads) {
    const Part part(outputs, GRAIN, thread, threads);
    for (int64_t at = part.begin; at < part.end; at += CHUNK) {
        const int64_t count = part.end - at < CHUNK ? part.end - at : CHUNK;
        product(x, inputs, rows, w + at * inputs, inputs, inputs, count, y + at, outputs, adds);
    }
}

void norm_row(const float* x, const float* weight, float eps, int64_t width, float* y) {
    Vector squares = {};
    for (int64_t i = 0; i < width; i += WIDTH) squares += load(x + i) * load(x + i);
    const float scale = 1.0f / std::sqrt(sum(squares) / float(width) + eps);
    for (int64_t i = 0; i < width; i += WIDTH) store(y + i, load(x + i) * scale * load(weight + i));
}

}  // namespace

extern "C" {

// Mirrored by models/native_decode.py.
struct Shape {
    int64_t hidden, groups, per_group, head_dim, feed_forward, places;  // places: of the cache
    float eps, head_eps, scale;
};

struct Layer {
    const float *input_norm, *qkv, *qkv_bias, *query_norm, *key_norm, *output, *mlp_norm, *gate_up, *down;
    float *keys, *values;  // [row of the cache, group, place, head_dim]
};

struct Window {
    int64_t sequences, tokens;  // n = sequences * tokens
    const int64_t* positions;   // [n]
    const int64_t* visible;     // [n]: places 0 ... visible - 1 are looked at
    const float *cos, *sin;     // [n, head_dim]: (cos | cos), (-sin | sin)
};

}  // extern "C"

namespace {

// What threads share while a layer runs, and which of them this is.
struct Work {
    const Shape& shape;
    const Window& window;
    float *x, *normed, *mixed, *found, *middle, *scores;
    int64_t rows, most_visible;
    int thread, threads;
};

// Norms of the heads, turns of queries and keys, and what the cache keeps.
void turn_and_keep(const Work& work, const Layer& layer) {
    const int64_t d = work.shape.head_dim, per_row = (work.shape.per_group + 2) * d, half = d / 2;
    const Part part(work.rows * work.shape.groups, 1, work.thread, work.threads);
    float turned[MOST_HEAD_DIM];
    for (int64_t unit = part.begin; unit < part.end; ++unit) {
        const int64_t row = unit / work.shape.groups, group = unit % work.shape.groups;
        float* heads = work.mixed + unit * per_row;
        if (layer.qkv_bias)
            for (int64_t i = 0; i < per_row; ++i) heads[i] += layer.qkv_bias[group * per_row + i];
        const float *cos = work.window.cos + row * d, *sin = work.window.sin + row * d;
        for (int64_t head = 0; head <= work.shape.per_group; ++head) {
            float* at = heads + head * d;
            const float* weight = head < work.shape.per_group ? layer.query_norm : layer.key_norm;
            if (weight) norm_row(at, weight, work.shape.head_eps, d, at);
            for (int64_t i = 0; i < half; ++i) turned[i] = at[i] * cos[i] + at[i + half] * sin[i];
            for (int64_t i = half; i < d; ++i) turned[i] = at[i] * cos[i] + at[i - half] * sin[i];
            std::memcpy(at, turned, d * sizeof(float));
        }
        // All padding of a sequence goes to the cache's last place, whoever is last: nobody looks at it.
        const int64_t place =
            ((row / work.window.tokens * work.shape.groups + group) * work.shape.places + work.window.positions[row]) * d;
        std::memcpy(layer.keys + place, heads + work.shape.per_group * d, d * sizeof(float));
        std::memcpy(layer.values + place, heads + (work.shape.per_group + 1) * d, d * sizeof(float));
    }
}

// Up to ROWS queries of one key/value head: softmax(q K^T) V, each over the places that it may look at.
void attend(const Work& work, const Layer& layer, int64_t sequence, int64_t group, int64_t first, int64_t count,
            float* scores) {
    const int64_t d = work.shape.head_dim, per_row = (work.shape.per_group + 2) * d;
    const int64_t base = (sequence * work.shape.groups + group) * work.shape.places * d;
    const float *keys = layer.keys + base, *values = layer.values + base;
    // Query number m of the head is head m % per_group of token m / per_group.
    const float* queries[8];
    float* targets[8];
    int64_t visible[8], most = 0;
    alignas(64) float gathered[8 * MOST_HEAD_DIM];
    for (int64_t m = 0; m < count; ++m) {
        const int64_t row = sequence * work.window.tokens + (first + m) / work.shape.per_group, head = (first + m) % work.shape.per_group;
        queries[m] = work.mixed + (row * work.shape.groups + group) * per_row + head * d;
        targets[m] = work.found + (row * work.shape.groups + group) * work.shape.per_group * d + head * d;
        visible[m] = work.window.visible[row];
        if (visible[m] > most) most = visible[m];
        for (int64_t i = 0; i < d; i += WIDTH) store(gathered + m * d + i, load(queries[m] + i) * work.shape.scale);
    }
    const int64_t stride = (work.most_visible + WIDTH - 1) / WIDTH * WIDTH;
    for (int64_t at = 0; at < most; at += KEYS) {
        const int64_t some = most - at < KEYS ? most - at : KEYS;
        product(gathered, d, count, keys + at * d, d, d, some, scores + at, stride, false);
    }
    float inverse[8];
    for (int64_t m = 0; m < count; ++m) {
        float* row = scores + m * stride;
        const int64_t end = (most + WIDTH - 1) / WIDTH * WIDTH;
        for (int64_t p = visible[m]; p < end; ++p) row[p] = -INFINITY;
        Vector largest = all(-INFINITY);
        for (int64_t p = 0; p < end; p += WIDTH) {
            const Vector v = load(row + p);
            largest = v > largest ? v : largest;
        }
        float parts[WIDTH], top = -INFINITY;
        store(parts, largest);
        for (float part : parts) top = part > top ? part : top;
        Vector total = {};
        for (int64_t p = 0; p < end; p += WIDTH) {
            const Vector v = load(row + p);
            const Vector e = v == -INFINITY ? Vector{} : exponential(v - top);
            store(row + p, e);
            total += e;
        }
        inverse[m] = 1.0f / sum(total);
    }
    const Mixtures& mixtures = MIXTURES[count - 1];
    for (int64_t i = 0; i < d;) {
        const bool is_wide = d - i >= mixtures.columns;
        (is_wide ? mixtures.wide : mixtures.narrow)(scores, stride, most, values, d, inverse, targets, i);
        i += is_wide ? mixtures.columns : WIDTH;
    }
}

void attention(const Work& work, const Layer& layer) {
    const int64_t queries = work.window.tokens * work.shape.per_group, blocks = (queries + ROWS - 1) / ROWS;
    const Part part(work.window.sequences * work.shape.groups * blocks, 1, work.thread, work.threads);
    float* scores = work.scores + work.thread * ROWS * ((work.most_visible + WIDTH - 1) / WIDTH * WIDTH);
    for (int64_t unit = part.begin; unit < part.end; ++unit) {
        const int64_t block = unit % blocks, group = unit / blocks % work.shape.groups;
        const int64_t first = queries * block / blocks, count = queries * (block + 1) / blocks - first;
        attend(work, layer, unit / blocks / work.shape.groups, group, first, count, scores);
    }
}

// silu(x w_gate) * (x w_up)
void gated(const Work& work, const Layer& layer) {
    const int64_t h = work.shape.hidden, f = work.shape.feed_forward;
    const Part part(f, CHUNK, work.thread, work.threads);  // whole vectors
    for (int64_t at = part.begin; at < part.end; at += CHUNK) {
        const int64_t count = part.end - at < CHUNK ? part.end - at : CHUNK;
        // The gate goes where its product with the other half will stand; that half to this thread's part of ``mixed``,
        // which nobody reads any more.
        product(work.normed, h, work.rows, layer.gate_up + at * h, h, h, count, work.middle + at, f, false);
        float* up = work.mixed + work.thread * work.rows * CHUNK;
        product(work.normed, h, work.rows, layer.gate_up + (f + at) * h, h, h, count, up, CHUNK, false);
        for (int64_t row = 0; row < work.rows; ++row)
            for (int64_t i = 0; i < count; i += WIDTH) {
                const Vector gate = load(work.middle + row * f + at + i);
                store(work.middle + row * f + at + i, gate / (exponential(-gate) + 1.0f) * load(up + row * CHUNK + i));
            }
    }
}

void norms(const Work& work, const float* weight, float* target) {
    const Part part(work.rows, 1, work.thread, work.threads);
    for (int64_t row = part.begin; row < part.end; ++row)
        norm_row(work.x + row * work.shape.hidden, weight, work.shape.eps, work.shape.hidden, target + row * work.shape.hidden);
}

struct Freed {
    void operator()(float* memory) const { std::free(memory); }
};

std::unique_ptr<float, Freed> room(int64_t floats) {
    return std::unique_ptr<float, Freed>(static_cast<float*>(std::aligned_alloc(64, (floats * 4 + 63) / 64 * 64)));
}

}  // namespace

extern "C" {

// Floats of a vector, of which widths are to be multiples; 0: not for this processor.
int64_t decode_width() { return IS_MEASURED ? WIDTH : 0; }

// y [n, o] = x [n, i] w^T, w [o, i]; WIDTH divides i.
void decode_product(const float* x, int64_t rows, const float* w, int64_t inputs, int64_t outputs, float* y,
                    int threads) {
#pragma omp parallel num_threads(threads)
    {
        const int thread = omp_get_thread_num(), count = omp_get_num_threads();
        whole_product(x, rows, w, inputs, outputs, y, false, thread, count);
    }
}

// x [n, h], embedded tokens, becomes states after the final norm; the cache gets what is kept of them. 1: no memory.
int decode_layers(const Shape* shape, const Layer* layers, int64_t num_layers, const float* final_norm,
                  const Window* window, float* x, int threads) {
    const Shape& s = *shape;
    const int64_t rows = window->sequences * window->tokens, heads = s.groups * s.per_group * s.head_dim;
    int64_t most_visible = 0;
    for (int64_t row = 0; row < rows; ++row)
        if (window->visible[row] > most_visible) most_visible = window->visible[row];
    const int64_t stride = (most_visible + WIDTH - 1) / WIDTH * WIDTH;
    int64_t mixed_width = heads + 2 * s.groups * s.head_dim;
    if (mixed_width < threads * CHUNK) mixed_width = threads * CHUNK;
    auto normed = room(rows * s.hidden), mixed = room(rows * mixed_width), found = room(rows * heads);
    auto middle = room(rows * s.feed_forward), scores = room(threads * ROWS * stride);
    if (!normed || !mixed || !found || !middle || !scores) return 1;
#pragma omp parallel num_threads(threads)
    {
        const int thread = omp_get_thread_num(), count = omp_get_num_threads();
        const Work work{s, *window, x, normed.get(), mixed.get(), found.get(), middle.get(), scores.get(),
                     rows, most_visible, thread, count};
        for (int64_t number = 0; number < num_layers; ++number) {
            const Layer& layer = layers[number];
            norms(work, layer.input_norm, work.normed);
#pragma omp barrier
            whole_product(work.normed, rows, layer.qkv, s.hidden, heads + 2 * s.groups * s.head_dim, work.mixed, false,
                          thread, count);
#pragma omp barrier
            turn_and_keep(work, layer);
#pragma omp barrier
            attention(work, layer);
#pragma omp barrier
            whole_product(work.found, rows, layer.output, heads, s.hidden, x, true, thread, count);
#pragma omp barrier
            norms(work, layer.mlp_norm, work.normed);
#pragma omp barrier
            gated(work, layer);
#pragma omp barrier
            whole_product(work.middle, rows, layer.down, s.feed_forward, s.hidden, x, true, thread, count);
#pragma omp barrier
        }
        norms(work, final_norm, work.normed);
#pragma omp barrier
        const Part part(rows, 1, thread, count);
        std::memcpy(x + part.begin * s.hidden, work.normed + part.begin * s.hidden,
                    (part.end - part.begin) * s.hidden * sizeof(float));
    }
    return 0;
}

}  // extern "C"
