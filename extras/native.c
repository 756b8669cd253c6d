/* The blocks of a GPT for the next token of each stream: LayerNorm, attention over the cache, MLP, all in one call.
 *
 * A single token passes through every weight once, so what counts is to read the weights as fast as memory delivers
 * them, without a pause. native.py compiles this file, fills the structures and decides when to call it. It is plain
 * C but for one instruction: the compiler turns the loops into the processor's vector instructions. Shapes are as in
 * gpt.py: B batch, S time with cached tokens, C channels, H heads, D = C / H; rows is B.
 */

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#if defined __x86_64__ && defined __GLIBC__
#pragma omp declare simd notinbranch
float expf(float);      /* the C library has one for vectors, too */
#endif

enum { MOST_ROWS = 8 };             /* B must not be more */
enum { FLOAT32, BFLOAT16, INT8 };   /* how numbers are stored */
enum { STORE, ADD, GELU };          /* a product p goes into y: y = p, y += p, or y = gelu(p) */

typedef struct {
    long type, n_in, n_out;
    const void *weight;             /* (n_out, n_in) */
    const float *bias;              /* (n_out,), or NULL */
    const float *scales;            /* int8 only, (n_out,): each row is its integers times this */
    const int32_t *sums;            /* int8 only, (n_out,): the sum of each row's integers */
} Linear;

typedef struct {
    long n_head, n_embd;
    const float *ln_1_weight, *ln_1_bias, *ln_2_weight, *ln_2_bias;     /* (C,) each */
    Linear c_attn, attn_proj, c_fc, mlp_proj;
} Block;

static float widen(uint16_t half)   /* bfloat16 is the upper half of a float32 */
{
    uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static uint16_t narrow(float value)     /* to the nearest bfloat16, ties to even */
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

/* The dot products of w (n,) with each row of x (rows, n). Eight rows share the reading of w, and each has its own sum,
 * so that none waits for another. */
#define DOTS(name, some, X, W, SUM)                                                             \
static void name(const X *x, long rows, const W *w, long n, SUM *sums)                          \
{                                                                                               \
    for (; rows >= 8; rows -= 8, x += 8 * n, sums += 8)                                        \
        some(x, 8, w, n, sums);                                                                 \
    for (; rows >= 4; rows -= 4, x += 4 * n, sums += 4)                                         \
        some(x, 4, w, n, sums);                                                                 \
    for (; rows > 0; rows--, x += n, sums++)                                                    \
        some(x, 1, w, n, sums);                                                                 \
}

#define PLAIN_DOTS(name, X, W, SUM, wide_x, wide_w)                                             \
static inline void some_##name(const X *x, const int rows, const W *w, long n, SUM *sums)       \
{                                                                                               \
    SUM s[8] = {0};                                                                             \
    for (long i = 0; i < n; i++)                                                                \
        _Pragma("GCC unroll 8")                                                                 \
        for (int r = 0; r < rows; r++)                                                          \
            s[r] += wide_x(x[r * n + i]) * wide_w(w[i]);                                        \
    _Pragma("GCC unroll 8")                                                                     \
    for (int r = 0; r < rows; r++)                                                              \
        sums[r] = s[r];                                                                         \
}                                                                                               \
DOTS(name, some_##name, X, W, SUM)
PLAIN_DOTS(dots_float32, float, float, float, , )
PLAIN_DOTS(dots_keys_bfloat16, uint16_t, float, float, widen, )
PLAIN_DOTS(dots_int8, uint8_t, int8_t, int32_t, , )

#ifdef __AVX512BF16__
/* The compiler does not find this instruction by itself: 32 products of bfloat16, added up in pairs. */
static inline void some_bfloat16(const uint16_t *x, const int rows, const uint16_t *w, long n, float *sums)
{
    __m512 s[8] = {0};
    long i = 0;
    for (; i + 32 <= n; i += 32)
        #pragma GCC unroll 8
        for (int r = 0; r < rows; r++)
            s[r] = _mm512_dpbf16_ps(s[r], (__m512bh)_mm512_loadu_si512(x + r * n + i), (__m512bh)_mm512_loadu_si512(w + i));
    __mmask32 rest = (1u << (n - i)) - 1;
    #pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
        __m512i some = _mm512_maskz_loadu_epi16(rest, x + r * n + i);
        sums[r] = _mm512_reduce_add_ps(_mm512_dpbf16_ps(s[r], (__m512bh)some, (__m512bh)_mm512_maskz_loadu_epi16(rest, w + i)));
    }
}
DOTS(dots_bfloat16, some_bfloat16, uint16_t, uint16_t, float)
#else
PLAIN_DOTS(dots_bfloat16, uint16_t, uint16_t, float, widen, widen)
#endif

/* A row of x (n,) -> integers from 1 to 255, where 128 means 0; returns their scale. */
static float quantize(const float *x, long n, uint8_t *integers)
{
    uint32_t most = 0;      /* the largest absolute value: without the sign, bits are in the same order as numbers */
    for (long i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, x + i, sizeof bits);
        bits &= 0x7fffffff;
        most = bits > most ? bits : most;
    }
    float largest;
    memcpy(&largest, &most, sizeof most);
    if (!(largest < INFINITY)) {    /* NaN or infinity: so are the products */
        memset(integers, 128, n);
        return NAN;
    }
    largest = fmaxf(largest, 1e-12f);
    for (long i = 0; i < n; i++)
        integers[i] = (int32_t)(x[i] * (127 / largest) + 128.5f);
    return largest / 127;
}

enum { KEYS = 64 };

/* One query (D,) over S keys and values (S, D) -> y (D,), a few keys at a time. The softmax runs along: a new largest
 * score shrinks the sums so far (online softmax, Milakov & Gimelshein 2018). */
static void attend(const float *query, const void *keys, const void *values, long type, long S, long D, float *y)
{
    float largest = -FLT_MAX, total = 0, root = sqrtf(D);
    memset(y, 0, D * sizeof *y);
    for (long from = 0; from < S; from += KEYS) {
        long n = S - from < KEYS ? S - from : KEYS;
        float weights[KEYS], most = largest;
        if (type == FLOAT32)
            dots_float32((const float *)keys + from * D, n, query, D, weights);
        else
            dots_keys_bfloat16((const uint16_t *)keys + from * D, n, query, D, weights);
        for (long s = 0; s < n; s++) {
            weights[s] /= root;
            most = weights[s] > most ? weights[s] : most;
        }
        float shrink = expf(largest - most);
        largest = most;
        total *= shrink;
        for (long d = 0; d < D; d++)
            y[d] *= shrink;
        #pragma omp simd reduction(+:total)
        for (long s = 0; s < n; s++) {
            weights[s] = expf(weights[s] - largest);
            total += weights[s];
        }
        for (long s = 0; s < n; s++)
            if (type == FLOAT32)
                for (long d = 0; d < D; d++)
                    y[d] += weights[s] * ((const float *)values)[(from + s) * D + d];
            else
                for (long d = 0; d < D; d++)
                    y[d] += weights[s] * widen(((const uint16_t *)values)[(from + s) * D + d]);
    }
    for (long d = 0; d < D; d++)
        y[d] /= total;
}

static void put(float value, void *to, long type, long i)
{
    if (type == FLOAT32)
        ((float *)to)[i] = value;
    else
        ((uint16_t *)to)[i] = narrow(value);
}

/* x (n,) in place: the tanh form of gpt.py, by (1 + tanh(u)) / 2 = 1 / (1 + exp(-2 u)). */
static void gelu(float *x, long n)
{
    #pragma omp simd
    for (long i = 0; i < n; i++)
        x[i] /= 1 + expf(-1.5957691216057308f * (x[i] + 0.044715f * x[i] * x[i] * x[i]));
}

/* All threads run the functions below together: each `omp for` shares out its iterations, and ends when all are done. */

/* x (rows, n_in), rounded to numbers of the weights' type, -> y (rows, n_out); work is room for 16 + rows * n_in
 * floats, of which a cache line is for the steps. */
static void linear(const Linear *p, long rows, const float *x, float *y, int after, float *work)
{
    long size = p->type == FLOAT32 ? 4 : p->type == BFLOAT16 ? 2 : 1;
    float *steps = work;
    uint8_t *integers = (uint8_t *)(work + 16);  /* (rows, n_in) */
    uint16_t *halves = (uint16_t *)(work + 16);  /* or these */
    if (p->type == INT8)
        #pragma omp for schedule(static)
        for (long r = 0; r < rows; r++)
            steps[r] = quantize(x + r * p->n_in, p->n_in, integers + r * p->n_in);
    else if (p->type == BFLOAT16)
        #pragma omp for simd schedule(static)
        for (long i = 0; i < rows * p->n_in; i++)
            halves[i] = narrow(x[i]);

    #pragma omp for schedule(static)
    for (long o = 0; o < p->n_out; o++) {
        const char *w = (const char *)p->weight + o * p->n_in * size;
        float sums[MOST_ROWS];
        int32_t integer_sums[MOST_ROWS];
        for (long i = 0; i < p->n_in * size; i += 64)   /* ask for weights two kilobytes ahead */
            __builtin_prefetch(w + 2048 + i);
        if (p->type == FLOAT32)
            dots_float32(x, rows, (const float *)w, p->n_in, sums);
        else if (p->type == BFLOAT16)
            dots_bfloat16(halves, rows, (const uint16_t *)w, p->n_in, sums);
        else {
            dots_int8(integers, rows, (const int8_t *)w, p->n_in, integer_sums);
            for (long r = 0; r < rows; r++)
                sums[r] = (integer_sums[r] - 128 * p->sums[o]) * (steps[r] * p->scales[o]);
        }
        for (long r = 0; r < rows; r++) {
            float *to = y + r * p->n_out + o, s = sums[r] + (p->bias ? p->bias[o] : 0);
            *to = after == ADD ? *to + s : s;
        }
    }
}

/* x (rows, n) -> y (rows, n): minus the mean, over the standard deviation, times weight, plus bias. */
static void layer_norm(const float *x, const float *weight, const float *bias, float *y, long rows, long n)
{
    #pragma omp for schedule(static)
    for (long r = 0; r < rows; r++) {
        const float *from = x + r * n;
        float mean = 0, variance = 0, *to = y + r * n;
        for (long i = 0; i < n; i++)
            mean += from[i];
        mean /= n;
        for (long i = 0; i < n; i++)
            variance += (from[i] - mean) * (from[i] - mean);
        float scale = 1 / sqrtf(variance / n + 1e-5f);
        for (long i = 0; i < n; i++)
            to[i] = (from[i] - mean) * scale * weight[i] + bias[i];
    }
}

/* A block changes x (B, C) in place. keys and values, (B, H, max_length, D) of cache_type, hold `past` tokens and get one
 * more. */
static void block(const Block *p, long B, float *x, void *keys, void *values, long cache_type, long past,
                  long max_length, float *work)
{
    long C = p->n_embd, H = p->n_head, D = C / H, size = cache_type == FLOAT32 ? 4 : 2;
    float *y = work, *wide = y + B * C, *rest = wide + B * 4 * C;       /* (B, C), (B, 4 C) */

    layer_norm(x, p->ln_1_weight, p->ln_1_bias, y, B, C);
    linear(&p->c_attn, B, y, wide, STORE, rest);        /* (B, 3 C): queries, keys, values */
    #pragma omp for schedule(static)
    for (long bh = 0; bh < B * H; bh++) {
        char *k = (char *)keys + bh * max_length * D * size, *v = (char *)values + bh * max_length * D * size;
        const float *q = wide + bh / H * 3 * C + bh % H * D;
        for (long d = 0; d < D; d++) {
            put(q[C + d], k, cache_type, past * D + d);
            put(q[2 * C + d], v, cache_type, past * D + d);
        }
        attend(q, k, v, cache_type, past + 1, D, y + bh * D);
    }
    linear(&p->attn_proj, B, y, x, ADD, rest);
    layer_norm(x, p->ln_2_weight, p->ln_2_bias, y, B, C);
    linear(&p->c_fc, B, y, wide, STORE, rest);          /* (B, 4 C) */
    #pragma omp for schedule(static)
    for (long i = 0; i < B * 4 * C; i += 64)
        gelu(wide + i, B * 4 * C - i < 64 ? B * 4 * C - i : 64);
    linear(&p->mlp_proj, B, wide, x, ADD, rest);
}

/* All blocks, one after the other, each with its own keys and values; work is room for 16 + B * 7 C floats. */
void gpt_blocks(const Block *blocks, long n_layer, long B, float *x, void **keys, void **values, long cache_type,
                long past, long max_length, float *work, long threads)
{
    #pragma omp parallel num_threads(threads)
    for (long i = 0; i < n_layer; i++)
        block(blocks + i, B, x, keys[i], values[i], cache_type, past, max_length, work);
}

void gpt_linear(const Linear *p, long rows, const float *x, float *y, float *work, long threads)
{
    #pragma omp parallel num_threads(threads)
    linear(p, rows, x, y, STORE, work);
}

/* Prompts, whose products PyTorch computes: x (rows, n) -> int8, and the step of each row. */
void gpt_quantize(const float *x, long rows, long n, uint8_t *integers, float *steps, long threads)
{
    #pragma omp parallel for schedule(static) num_threads(threads)
    for (long r = 0; r < rows; r++) {
        steps[r] = quantize(x + r * n, n, integers + r * n);
        for (long i = 0; i < n; i++)
            integers[r * n + i] ^= 128;     /* 128 for 0 becomes 0 */
    }
}

/* The sums of products (rows, n_out), int32 if the weights are int8, -> y, which may be the same memory. */
void gpt_finish(const Linear *p, long rows, const void *sums, const float *steps, float *y, long after, long threads)
{
    const float *scales = p->scales, *bias = p->bias;
    #pragma omp parallel for schedule(static) num_threads(threads)
    for (long r = 0; r < rows; r++) {
        const char *from = (const char *)sums + r * p->n_out * 4;
        float *to = y + r * p->n_out, step = p->type == INT8 ? steps[r] : 0;
        #pragma omp simd
        for (long o = 0; o < p->n_out; o++) {
            float s;
            int32_t integer;
            memcpy(&s, from + 4 * o, 4);
            memcpy(&integer, from + 4 * o, 4);
            s = (scales ? integer * (step * scales[o]) : s) + bias[o];
            to[o] = after == ADD ? to[o] + s : s;
        }
        if (after == GELU)
            gelu(to, p->n_out);
    }
}
