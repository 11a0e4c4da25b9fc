/* Operations of a decoding step: a few rows, each with its next token.

   Weights and KV cache are in fp32 or, if `half` is 1, in bf16, which is the upper half of an fp32
   number. All else is fp32, sums too. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#define WIDTH 16
#elif defined(__AVX__)
#define WIDTH 8
#else
#define WIDTH 4
#endif
typedef float vector __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef uint32_t pairs __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
#define INLINE static inline __attribute__((always_inline))

/* Number i of an array. */
INLINE float get(const void *array, int64_t i, int half)
{
    const uint32_t bits = half ? (uint32_t)((const uint16_t *)array)[i] << 16
                               : ((const uint32_t *)array)[i];
    float number;
    memcpy(&number, &bits, sizeof number);
    return number;
}

/* Set it; bf16 is rounded to the nearest, ties to even. */
INLINE void set(void *array, int64_t i, float number, int half)
{
    uint32_t bits;
    memcpy(&bits, &number, sizeof bits);
    if (half)
        ((uint16_t *)array)[i] = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    else
        ((uint32_t *)array)[i] = bits;
}

/* ---- Products with a weight matrix.

   Such a product reads every weight once and does little with it, so it takes as long as reading
   them from memory. They are stored in panels of COLUMNS outputs, one after the other for each
   input, so memory is read in order; in bf16 those of the two vectors alternate, so that the even
   and the odd halves of a vector of pairs are one each. A panel is processed in blocks of DEPTH inputs: a block stays
   in the L1 cache while it is multiplied by a few rows at a time, whose sums are in registers, and
   meanwhile the next block is prefetched. */

#define COLUMNS (2 * WIDTH)
#define DEPTH 64
#define TOGETHER 6 /* rows in registers: with AVX2 12 sums, 2 vectors of weights and an input */
#define AT_ONCE 48 /* rows per reading of a panel */

int64_t columns(void) { return COLUMNS; }

/* Copy W[outputs][inputs] to panels[..][inputs][COLUMNS], beginning at output `offset`. */
void lay_out(
    const void *weights, int64_t outputs, int64_t inputs, int64_t offset, void *panels, int64_t half,
    int64_t threads)
{
    const int64_t end = offset + outputs;
#pragma omp parallel for num_threads(threads)
    for (int64_t first = offset - offset % COLUMNS; first < end; first += COLUMNS) {
        const int64_t from = first < offset ? offset : first;
        const int64_t to = first + COLUMNS < end ? first + COLUMNS : end;
        for (int64_t start = 0; start < inputs; start += 16) { /* a cache line of each row */
            const int64_t stop = start + 16 < inputs ? start + 16 : inputs;
            for (int64_t column = from; column < to; column++) {
                const int64_t c = column - first, row = (column - offset) * inputs;
                const int64_t half_c = c < WIDTH ? 2 * c : 2 * (c - WIDTH) + 1;
                for (int64_t k = start; k < stop; k++) {
                    const int64_t place = first * inputs + k * COLUMNS;
                    if (half)
                        ((uint16_t *)panels)[place + half_c] = ((uint16_t *)weights)[row + k];
                    else
                        ((float *)panels)[place + c] = ((float *)weights)[row + k];
                }
            }
        }
    }
}

/* sums += x[rows][depth] panel[depth][COLUMNS]; prefetch every `stride`th line from `next`. */
INLINE void block(
    int half, int rows, const float *x, int64_t inputs, const char *panel, int depth,
    const char *next, int stride, vector (*sums)[2])
{
    const int line = COLUMNS * (half ? 2 : 4);
    vector sum[TOGETHER][2];
    int due = 0;
    for (int r = 0; r < rows; r++) {
        sum[r][0] = sums[r][0];
        sum[r][1] = sums[r][1];
    }
    for (int k = 0; k < depth; k++, panel += line) {
        /* Before the branch, so that the weights are loaded once and not again for every row. */
        const pairs both = *(const pairs *)panel;
        const vector left = half ? (vector)(both << 16) : *(const vector *)panel;
        const vector right = half ? (vector)(both & 0xffff0000) : ((const vector *)panel)[1];
        if (k == due) {
            __builtin_prefetch(next + k * line);
            due += stride;
        }
        for (int r = 0; r < rows; r++) {
            const float input = x[r * inputs + k];
            sum[r][0] += input * left;
            sum[r][1] += input * right;
        }
    }
    for (int r = 0; r < rows; r++) {
        sums[r][0] = sum[r][0];
        sums[r][1] = sum[r][1];
    }
}

/* The same for up to AT_ONCE rows, in as few groups as possible of similar size. */
INLINE void block_of_all(
    int half, int rows, const float *x, int64_t inputs, const char *panel, int depth,
    const char *next, vector (*sums)[2])
{
    const int groups = (rows + TOGETHER - 1) / TOGETHER;
    for (int g = 0, r = 0; g < groups; g++) {
        const int size = (rows - r) / (groups - g);
        /* The compiler must know the size to keep the sums in registers. */
#define ROWS(n) \
    case n: \
        block(half, n, x + r * inputs, inputs, panel, depth, next + g * COLUMNS * (half ? 2 : 4), \
              groups, sums + r); \
        break;
        switch (size) { ROWS(1) ROWS(2) ROWS(3) ROWS(4) ROWS(5) ROWS(6) }
#undef ROWS
        r += size;
    }
}

/* y[rows][outputs] = x[rows][inputs] W^T + bias (which may be NULL), with W from `lay_out`. */
INLINE void product_of(
    int half, const float *x, int64_t rows, int64_t inputs, const char *panels, const float *bias,
    int64_t outputs, float *y, int64_t threads)
{
    const int64_t width = half ? 2 : 4; /* bytes of a weight */
#pragma omp parallel for num_threads(threads)
    for (int64_t column = 0; column < outputs; column += COLUMNS) {
        const char *panel = panels + column * inputs * width;
        const int64_t some = outputs - column < COLUMNS ? outputs - column : COLUMNS;
        vector start[2] = {0}, sums[AT_ONCE][2];
        if (bias)
            memcpy(start, bias + column, some * sizeof(float));
        for (int64_t first = 0; first < rows; first += AT_ONCE) {
            const int here = rows - first < AT_ONCE ? rows - first : AT_ONCE;
            for (int r = 0; r < here; r++)
                memcpy(sums[r], start, sizeof start);
            for (int64_t k = 0; k < inputs; k += DEPTH) {
                const int depth = inputs - k < DEPTH ? inputs - k : DEPTH;
                block_of_all(half, here, x + first * inputs + k, inputs,
                             panel + k * COLUMNS * width, depth,
                             panel + (k + depth) * COLUMNS * width, sums);
            }
            for (int r = 0; r < here; r++)
                memcpy(y + (first + r) * outputs + column, sums[r], some * sizeof(float));
        }
    }
}

void product(
    const float *x, int64_t rows, int64_t inputs, const char *panels, const float *bias,
    int64_t outputs, float *y, int64_t half, int64_t threads)
{
    if (half) /* the compiler makes two of it */
        product_of(1, x, rows, inputs, panels, bias, outputs, y, threads);
    else
        product_of(0, x, rows, inputs, panels, bias, outputs, y, threads);
}

/* ---- Operations between the products. */

/* y = x / sqrt(mean of x^2 + epsilon) * weight, for each row of x[rows][size]. */
void normalize(
    const float *x, int64_t rows, int64_t size, const float *weight, float epsilon,
    float *restrict y)
{
    for (int64_t r = 0; r < rows; r++, x += size, y += size) {
        float squares = 0;
#pragma omp simd reduction(+ : squares)
        for (int64_t i = 0; i < size; i++)
            squares += x[i] * x[i];
        const float factor = 1 / sqrtf(squares / size + epsilon);
        for (int64_t i = 0; i < size; i++)
            y[i] = x[i] * factor * weight[i];
    }
}

/* Rotary embedding of one head; the two sides of a plane are a half of the head apart. */
INLINE void rotate(
    const float *from, const float *cosines, const float *sines, int64_t size, void *restrict to,
    int64_t place, int half)
{
    const int64_t middle = size / 2;
    for (int64_t i = 0; i < middle; i++) {
        const float left = from[i], right = from[middle + i];
        set(to, place + i, left * cosines[i] - right * sines[i], half);
        set(to, place + middle + i, right * cosines[middle + i] + left * sines[middle + i], half);
    }
}

/* e^x for -87 <= x <= 0, accurate to the last bits of fp32 and vectorizable: 2^n e^r with an integer
   n and |r| <= ln 2 / 2, e^r by its series. */
static inline float exponential(float x)
{
    const int32_t n = x * 1.44269504f - 0.5f; /* truncation toward 0: the nearest */
    const float r = x - n * 0.693145752f - n * 1.42860677e-6f; /* ln 2 in two parts */
    float power = 1.f / 5040;
    power = power * r + 1.f / 720;
    power = power * r + 1.f / 120;
    power = power * r + 1.f / 24;
    power = power * r + 1.f / 6;
    power = power * r + 1.f / 2;
    power = power * r + 1;
    power = power * r + 1;
    const int32_t bits = (n + 127) << 23;
    float whole;
    memcpy(&whole, &bits, sizeof whole);
    return power * whole;
}

/* Softmax of scores[count], in place. */
static void softmax(float *scores, int64_t count)
{
    float largest = scores[0], sum = 0;
#pragma omp simd reduction(max : largest)
    for (int64_t i = 0; i < count; i++)
        largest = scores[i] > largest ? scores[i] : largest;
    for (int64_t i = 0; i < count; i++) /* e^-87 is about the smallest normal number */
        scores[i] = scores[i] > largest - 87 ? scores[i] - largest : -87;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < count; i++) {
        scores[i] = exponential(scores[i]);
        sum += scores[i];
    }
    for (int64_t i = 0; i < count; i++)
        scores[i] /= sum;
}

/* Attention of each row's new token to the row's columns of the cache, itself included.

   joined: [rows][heads + 2 key_heads][size], queries, keys and values before the rotary embedding.
   cosines, sines: [rows][size].
   keys, values: [..][key_heads][columns][size]; the new token's are written to column `front`.
   starts: [rows] the first column of each row.
   scores: [rows][heads][columns], scratch memory.
   y: [rows][heads][size]. */
INLINE void attend_in(
    int half, const float *joined, int64_t rows, int64_t heads, int64_t key_heads, int64_t size,
    const float *cosines, const float *sines, void *keys, void *values, int64_t columns,
    int64_t front, const int64_t *starts, float scale, float *scores, float *y, int64_t threads)
{
    const int64_t group = heads / key_heads; /* query heads that share a key head */
#pragma omp parallel for collapse(2) num_threads(threads)
    for (int64_t row = 0; row < rows; row++)
        for (int64_t head = 0; head < key_heads; head++) {
            const float *given = joined + row * (heads + 2 * key_heads) * size;
            const float *value = given + (heads + key_heads + head) * size;
            const float *cosine = cosines + row * size, *sine = sines + row * size;
            const int64_t at = row * key_heads + head, start = starts[row];
            const int64_t count = front + 1 - start, first = (at * columns + start) * size;
            const int64_t last = (at * columns + front) * size;
            float *score = scores + at * group * columns;
            float *result = y + at * group * size; /* the queries at first */
            rotate(given + (heads + head) * size, cosine, sine, size, keys, last, half);
            for (int64_t i = 0; i < size; i++)
                set(values, last + i, value[i], half);
            for (int64_t g = 0; g < group; g++)
                rotate(given + (head * group + g) * size, cosine, sine, size, result, g * size, 0);
            for (int64_t c = 0; c < count; c++)
                for (int64_t g = 0; g < group; g++) {
                    float sum = 0;
#pragma omp simd reduction(+ : sum)
                    for (int64_t i = 0; i < size; i++)
                        sum += result[g * size + i] * get(keys, first + c * size + i, half);
                    score[g * columns + c] = sum * scale;
                }
            for (int64_t g = 0; g < group; g++)
                softmax(score + g * columns, count);
            memset(result, 0, group * size * sizeof(float));
            for (int64_t c = 0; c < count; c++)
                for (int64_t g = 0; g < group; g++)
#pragma omp simd
                    for (int64_t i = 0; i < size; i++)
                        result[g * size + i] +=
                            score[g * columns + c] * get(values, first + c * size + i, half);
        }
}

void attend(
    const float *joined, int64_t rows, int64_t heads, int64_t key_heads, int64_t size,
    const float *cosines, const float *sines, void *keys, void *values, int64_t columns,
    int64_t front, const int64_t *starts, float scale, float *scores, float *y, int64_t half,
    int64_t threads)
{
    if (half)
        attend_in(1, joined, rows, heads, key_heads, size, cosines, sines, keys, values, columns,
                  front, starts, scale, scores, y, threads);
    else
        attend_in(0, joined, rows, heads, key_heads, size, cosines, sines, keys, values, columns,
                  front, starts, scale, scores, y, threads);
}
