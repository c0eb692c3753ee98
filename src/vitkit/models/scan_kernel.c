/* The recurrence h_t = 2^(d_t A2) h_{t-1} + x_t b_t, y_t = sum_s c_ts h_ts and its gradient, in float32.
 *
 * Channels are the lanes of a vector and the S states stay in registers, so that a step reads its inputs once and the
 * states of all steps are never written to memory. forward() and backward() serve one group of n channels of one image:
 * rows of x, d, y, dx, dd, dy are `row` floats apart, those of b, c, db, dc are `brow` floats apart; states, A2, A and
 * dA are (S, n). The functions at the end go through images and groups; their tensors are contiguous,
 * x, d, y (B, L, G, n), b, c (B, L, G, S), A (G, S, n), states and dA (B, G, S, n), marks (M, B, G, S, n).
 * Vectors are GCC's and Clang's, which lower them to what the processor has.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define W 16
#define MOST 64 /* states; scan_kernel.py knows it too */
typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
#define ALWAYS static inline __attribute__((always_inline))

#if defined(__SSE2__)
#include <xmmintrin.h>
/* fading states become denormal numbers, which cost a hundred cycles each; they count as zero in here */
#define ENTER unsigned saved = _mm_getcsr(); _mm_setcsr(saved | 0x8040)
#define LEAVE _mm_setcsr(saved)
#else
#define ENTER
#define LEAVE
#endif

/* the last vector of a group may have less than W channels: the rest are zeros, which stay zeros */
ALWAYS vf load(const float *p, long n) {
    vf v;
    if (n >= W) {
        memcpy(&v, p, sizeof v);
    } else {
        v = (vf){0};
        memcpy(&v, p, n * sizeof(float));
    }
    return v;
}

ALWAYS void store(float *p, vf v, long n) { memcpy(p, &v, n >= W ? sizeof v : n * sizeof(float)); }

/* 2^x to 1.2e-7, for x below 128; 0 below -126, NaN stays NaN */
ALWAYS vf exp2v(vf x) {
    vi tiny = x < -126.0f;
    /* adding 1.5 * 2^23 leaves the rounded x in the low bits */
    vf shifted = x + 12582912.0f;
    vf r = x - (shifted - 12582912.0f);
    vf p = r * 1.535336188319500e-4f + 1.339887440266574e-3f;
    p = p * r + 9.618437357674640e-3f;
    p = p * r + 5.550332471162809e-2f;
    p = p * r + 2.402264791363012e-1f;
    p = p * r + 6.931472028550421e-1f;
    p = p * r + 1.0f;
    p *= (vf)(((vi)shifted << 23) + 0x3f800000);
    return (vf)((vi)p & ~tiny);
}

ALWAYS void forward(long S, long L, long n, long row, long brow, long every, const float *x, const float *d,
                    const float *A2, const float *b, const float *c, float *h, float *marks, long between, float *y) {
    vf H[MOST], A[MOST];
    for (long e = 0; e < n; e += W) {
        long m = n - e;
        for (long s = 0; s < S; s++) {
            H[s] = load(h + s * n + e, m);
            A[s] = load(A2 + s * n + e, m);
        }
        for (long t = 0; t < L; t++) {
            if (marks && t % every == 0) {
                float *to = marks + t / every * between;
                for (long s = 0; s < S; s++) store(to + s * n + e, H[s], m);
            }
            vf dt = load(d + t * row + e, m), xt = load(x + t * row + e, m), out = {0};
            const float *bt = b + t * brow, *ct = c + t * brow;
#pragma GCC unroll 16
            for (long s = 0; s < S; s++) {
                H[s] = exp2v(dt * A[s]) * H[s] + xt * bt[s];
                out += H[s] * ct[s];
            }
            store(y + t * row + e, out, m);
        }
        for (long s = 0; s < S; s++) store(h + s * n + e, H[s], m);
    }
}

/* g holds the gradient of the last state and becomes that of the first one; room is 4 * every * S + S vectors */
ALWAYS void backward(long S, long L, long n, long row, long brow, long every, const float *x, const float *d,
                     const float *A2, const float *A, const float *b, const float *c, const float *marks, long between,
                     const float *dy, float *g, float *dx, float *dd, float *dA, float *db, float *dc, vf *room) {
    vf *h = room, *a = h + (every + 1) * S, *sum_b = a + every * S, *sum_c = sum_b + every * S;
    vf G[MOST], DA[MOST], R[MOST];
    for (long i = (L + every - 1) / every - 1; i >= 0; i--) {
        long first = i * every, k = L - first < every ? L - first : every;
        memset(sum_b, 0, k * S * sizeof(vf));
        memset(sum_c, 0, k * S * sizeof(vf));
        for (long e = 0; e < n; e += W) {
            long m = n - e;
            for (long s = 0; s < S; s++) {
                h[s] = load(marks + i * between + s * n + e, m);
                R[s] = load(A2 + s * n + e, m);
            }
            for (long j = 0; j < k; j++) {
                long t = first + j;
                vf dt = load(d + t * row + e, m), xt = load(x + t * row + e, m);
                const float *bt = b + t * brow;
                vf *hj = h + j * S, *aj = a + j * S;
#pragma GCC unroll 16
                for (long s = 0; s < S; s++) {
                    aj[s] = exp2v(dt * R[s]);
                    hj[S + s] = aj[s] * hj[s] + xt * bt[s];
                }
            }
            for (long s = 0; s < S; s++) {
                G[s] = load(g + s * n + e, m);
                DA[s] = load(dA + s * n + e, m);
                R[s] = load(A + s * n + e, m);
            }
            for (long j = k - 1; j >= 0; j--) {
                long t = first + j;
                vf dt = load(d + t * row + e, m), xt = load(x + t * row + e, m), dyt = load(dy + t * row + e, m);
                vf to_x = {0}, to_d = {0};
                const float *bt = b + t * brow, *ct = c + t * brow;
                vf *hj = h + j * S, *aj = a + j * S, *bj = sum_b + j * S, *cj = sum_c + j * S;
#pragma GCC unroll 16
                for (long s = 0; s < S; s++) {
                    vf q = G[s] + dyt * ct[s];
                    cj[s] += dyt * hj[S + s];
                    bj[s] += q * xt;
                    to_x += q * bt[s];
                    q *= aj[s];
                    G[s] = q;
                    q *= hj[s];
                    to_d += q * R[s];
                    DA[s] += q * dt;
                }
                store(dx + t * row + e, to_x, m);
                store(dd + t * row + e, to_d, m);
            }
            for (long s = 0; s < S; s++) {
                store(g + s * n + e, G[s], m);
                store(dA + s * n + e, DA[s], m);
            }
        }
        for (long j = 0; j < k; j++)
            for (long s = 0; s < S; s++) {
                float p = 0, q = 0;
                for (int w = 0; w < W; w++) {
                    p += sum_b[j * S + s][w];
                    q += sum_c[j * S + s][w];
                }
                db[(first + j) * brow + s] = p;
                dc[(first + j) * brow + s] = q;
            }
    }
}

/* a number of states known here stays in registers */
#define FOR_EACH_S(CALL) \
    if (S == 16) { enum { N = 16 }; CALL; } \
    else if (S == 8) { enum { N = 8 }; CALL; } \
    else if (S == 1) { enum { N = 1 }; CALL; } \
    else { const long N = S; CALL; }

/* images and groups number `from` to `to`, counted as image * G + group */
#define FOR_EACH_TASK \
    for (long task = from; task < to; task++) { \
        long at = task / G * L * G * n + task % G * n, bat = task / G * L * G * S + task % G * S; \
        long group = task % G * S * n, state = task * S * n;

void scan_forward(long from, long to, long S, long L, long G, long n, long every, long between, const float *x,
                  const float *d, const float *A2, const float *b, const float *c, float *h, float *marks, float *y) {
    ENTER;
    FOR_EACH_TASK
        float *first = marks ? marks + state : NULL;
        FOR_EACH_S(forward(N, L, n, G * n, G * S, every, x + at, d + at, A2 + group, b + bat, c + bat, h + state, first,
                           between, y + at))
    }
    LEAVE;
}

/* 0, or 1 if there is no memory for the work space */
int scan_backward(long from, long to, long S, long L, long G, long n, long every, long between, const float *x,
                  const float *d, const float *A2, const float *A, const float *b, const float *c, const float *marks,
                  const float *dy, float *g, float *dx, float *dd, float *dA, float *db, float *dc) {
    void *room = NULL;
    if (posix_memalign(&room, sizeof(vf), (4 * every + 1) * S * sizeof(vf))) return 1;
    ENTER;
    FOR_EACH_TASK
        FOR_EACH_S(backward(N, L, n, G * n, G * S, every, x + at, d + at, A2 + group, A + group, b + bat, c + bat,
                            marks + state, between, dy + at, g + state, dx + at, dd + at, dA + state, db + bat,
                            dc + bat, room))
    }
    LEAVE;
    free(room);
    return 0;
}
