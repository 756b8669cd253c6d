/* The blocks of a GPT for the next token of each stream: LayerNorm, attention over the cache, MLP, all in one call.
 *
 * A single token passes through every weight once, so what counts is to read the weights as fast as memory delivers
 * them, without a pause. native.py compiles this file, fills the structures and decides when to call it. It is plain
 * C: the compiler turns the loops into the processor's vector instructions. Shapes are as in gpt.py: B batch, S time
 * with cached tokens, C channels, H heads, D = C / H; rows is B.
 */

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined __x86_64__ && defined __GLIBC__
#pragma omp declare simd notinbranch
float expf(float);      /* the C library has one for vectors, too */
#endif

enum { MOST_ROWS = 8 };             /* B must not be more */
enum { FLOAT32, BFLOAT16, INT8 };   /* how numbers are stored */
enum { STORE, ADD };                /* a product p goes into y: y = p, or y += p */

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

/* The dot products of w (n,) with each row of x (rows, n). Four rows share the reading of w, and each has its own sum,
 * so that none waits for another. */
#define DOTS(name, X, W, SUM, wide_x, wide_w)                                                   \
static void name(const X *x, long rows, const W *w, long n, SUM *sums)                          \
{                                                                                               \
    long r = 0;                                                                                 \
    for (; r + 4 <= rows; r += 4, x += 4 * n) {                                                 \
        const X *x1 = x + n, *x2 = x + 2 * n, *x3 = x + 3 * n;                                  \
        SUM s0 = 0, s1 = 0, s2 = 0, s3 = 0;                                                     \
        for (long i = 0; i < n; i++) {                                                          \
            s0 += wide_x(x[i]) * wide_w(w[i]);                                                  \
            s1 += wide_x(x1[i]) * wide_w(w[i]);                                                 \
            s2 += wide_x(x2[i]) * wide_w(w[i]);                                                 \
            s3 += wide_x(x3[i]) * wide_w(w[i]);                                                 \
        }                                                                                       \
        sums[r] = s0, sums[r + 1] = s1, sums[r + 2] = s2, sums[r + 3] = s3;                     \
    }                                                                                           \
    for (; r < rows; r++, x += n) {                                                             \
        SUM sum = 0;                                                                            \
        for (long i = 0; i < n; i++)                                                            \
            sum += wide_x(x[i]) * wide_w(w[i]);                                                 \
        sums[r] = sum;                                                                          \
    }                                                                                           \
}
DOTS(dots_float32, float, float, float, , )
DOTS(dots_bfloat16, float, uint16_t, float, , widen)
DOTS(dots_keys_bfloat16, uint16_t, float, float, widen, )
DOTS(dots_int8, uint8_t, int8_t, int32_t, , )

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

/* All threads run the functions below together: each `omp for` shares out its iterations, and ends when all are done. */

/* x (rows, n_in) -> y (rows, n_out); work is room for MOST_ROWS + rows * n_in floats. */
static void linear(const Linear *p, long rows, const float *x, float *y, int after, float *work)
{
    long size = p->type == FLOAT32 ? 4 : p->type == BFLOAT16 ? 2 : 1;
    float *steps = work;
    uint8_t *integers = (uint8_t *)(work + MOST_ROWS);  /* (rows, n_in) */
    if (p->type == INT8)
        #pragma omp for schedule(static)
        for (long r = 0; r < rows; r++)
            steps[r] = quantize(x + r * p->n_in, p->n_in, integers + r * p->n_in);

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
            dots_bfloat16(x, rows, (const uint16_t *)w, p->n_in, sums);
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

/* x (n,) in place: the tanh form of gpt.py, by (1 + tanh(u)) / 2 = 1 / (1 + exp(-2 u)). */
static void gelu(float *x, long n)
{
    #pragma omp for simd schedule(static)
    for (long i = 0; i < n; i++)
        x[i] /= 1 + expf(-1.5957691216057308f * (x[i] + 0.044715f * x[i] * x[i] * x[i]));
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
    gelu(wide, B * 4 * C);
    linear(&p->mlp_proj, B, wide, x, ADD, rest);
}

/* All blocks, one after the other, each with its own keys and values; work is room for MOST_ROWS + B * 6 C floats. */
void gpt_blocks(const Block *blocks, long n_layer, long B, float *x, void **keys, void **values, long cache_type,
                long past, long max_length, float *work, int threads)
{
    #pragma omp parallel num_threads(threads)
    for (long i = 0; i < n_layer; i++)
        block(blocks + i, B, x, keys[i], values[i], cache_type, past, max_length, work);
}

void gpt_linear(const Linear *p, long rows, const float *x, float *y, float *work, int threads)
{
    #pragma omp parallel num_threads(threads)
    linear(p, rows, x, y, STORE, work);
}
