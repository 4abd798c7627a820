// CUDA kernels for the ops of tinyllm.functional that are limited by memory bandwidth.
//
// Each reads and writes its arrays in one pass instead of one per NumPy call. Its formula is that in the docstring
// of the NumPy op it is tested against. launch.py compiles and launches the kernels, functional/cuda.py calls
// them. Matrix products are computed by cuBLAS.
//
// Template parameters are types of arrays: X of what a norm reads (the residual stream, or a product), W of a
// weight, T of the operands and results of products (float, double, __half or __nv_bfloat16). Everything is computed
// in A: double if the array is double, else float. One block of threads, a multiple of 32, processes one row. No
// result depends on the order in which threads run: equal inputs give bitwise identical outputs.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#ifndef INFINITY  // where the compiler runs without the C library's headers
#define INFINITY __int_as_float(0x7f800000)
#endif

typedef long long Int;
typedef unsigned long long Bits;

template <class T> struct Computed { using In = float; };
template <> struct Computed<double> { using In = double; };

struct Sum {
    template <class A> __device__ static A of(A a, A b) { return a + b; }
};
struct Maximum {
    template <class A> __device__ static A of(A a, A b) { return a > b ? a : b; }
};

// The sum (or maximum) of x over all threads of a block, bitwise identical in each thread: first over the 32 of a
// warp, which can read each other's registers, then over the warps. `neutral` is the value of missing warps.
template <class Op, class A> __device__ A over_block(A x, A neutral) {
    __shared__ A of_warp[32];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    for (int step = 16; step > 0; step /= 2) x = Op::of(x, __shfl_xor_sync(0xffffffff, x, step));
    if (lane == 0) of_warp[warp] = x;
    __syncthreads();
    x = lane < warps ? of_warp[lane] : neutral;
    for (int step = 16; step > 0; step /= 2) x = Op::of(x, __shfl_xor_sync(0xffffffff, x, step));
    __syncthreads();  // all threads have read of_warp: the next call may overwrite it
    return x;
}

template <class A> __device__ A sum_over_block(A x) { return over_block<Sum>(x, A(0)); }

// ---------------------------------------------------------------------------------------------------- norms

// y = x^ w + b with x^ = (x - mean) inv, of every row of x (N, C). CENTRED: layer_norm, inv = 1 / sqrt(var + eps);
// otherwise rms_norm, mean = 0 and inv = 1 / sqrt(mean(x^2) + eps). w and b may be null; `offset` is added to w.
// Stores mean and inv (N).
template <bool CENTRED, class X, class W, class T, class A = typename Computed<X>::In>
__global__ void norm(const X* x, const W* w, const W* b, T* y, A* mean, A* inv, Int C, double eps,
                     double offset) {
    Int row = blockIdx.x;
    x += row * C, y += row * C;
    A mu = 0;
    if (CENTRED) {
        A total = 0;
        for (Int c = threadIdx.x; c < C; c += blockDim.x) total += A(x[c]);
        mu = sum_over_block(total) / C;
    }
    A squares = 0;
    for (Int c = threadIdx.x; c < C; c += blockDim.x) squares += (A(x[c]) - mu) * (A(x[c]) - mu);
    A scale = 1 / sqrt(sum_over_block(squares) / C + A(eps));
    for (Int c = threadIdx.x; c < C; c += blockDim.x)
        y[c] = T((A(x[c]) - mu) * scale * (w ? A(w[c]) + A(offset) : A(1)) + (b ? A(b[c]) : A(0)));
    if (threadIdx.x == 0) {
        inv[row] = scale;
        if (CENTRED) mean[row] = mu;
    }
}

// dx = (d - mean(d) - x^ mean(d x^)) inv with d = g w; for rms_norm the term mean(d) is 0.
template <bool CENTRED, class X, class W, class T, class A = typename Computed<X>::In>
__global__ void norm_back(const X* x, const W* w, const A* mean, const A* inv, const T* g, X* dx, Int C,
                          double offset) {
    Int row = blockIdx.x;
    x += row * C, g += row * C, dx += row * C;
    A mu = CENTRED ? mean[row] : A(0), scale = inv[row], sum_d = 0, sum_dx = 0;
    for (Int c = threadIdx.x; c < C; c += blockDim.x) {
        A d = A(g[c]) * (w ? A(w[c]) + A(offset) : A(1));
        sum_d += d;
        sum_dx += d * ((A(x[c]) - mu) * scale);
    }
    A mean_d = CENTRED ? sum_over_block(sum_d) / C : A(0), mean_dx = sum_over_block(sum_dx) / C;
    for (Int c = threadIdx.x; c < C; c += blockDim.x) {
        A d = A(g[c]) * (w ? A(w[c]) + A(offset) : A(1));
        dx[c] = X((d - mean_d - (A(x[c]) - mu) * scale * mean_dx) * scale);
    }
}

// Sums over rows of g (N, C), the gradients of a bias and of a norm's scale: db = sum g, dw = sum g x^.
// A block of 32 x 8 threads sums 32 columns over `rows` rows; each such partial sum is a row of db and dw
// (parts, C). If x is null, dw is not computed. mean and db may be null.
template <class X, class T, class A = typename Computed<X>::In>
__global__ void over_rows(const X* x, const A* mean, const A* inv, const T* g, A* dw, A* db, Int N, Int C,
                          Int rows) {
    __shared__ A parts[2][8][32];
    Int c = blockIdx.x * Int(32) + threadIdx.x, first = blockIdx.y * rows;
    Int last = first + rows < N ? first + rows : N;
    A sum_g = 0, sum_gx = 0;
    for (Int n = first + threadIdx.y; n < last && c < C; n += 8) {
        A g_nc = A(g[n * C + c]);
        sum_g += g_nc;
        if (x) sum_gx += g_nc * ((A(x[n * C + c]) - (mean ? mean[n] : A(0))) * inv[n]);
    }
    parts[0][threadIdx.y][threadIdx.x] = sum_g, parts[1][threadIdx.y][threadIdx.x] = sum_gx;
    __syncthreads();
    if (threadIdx.y > 0 || c >= C) return;
    for (int i = 1; i < 8; i++) {
        sum_g += parts[0][i][threadIdx.x];
        sum_gx += parts[1][i][threadIdx.x];
    }
    if (db) db[blockIdx.y * C + c] = sum_g;
    if (dw) dw[blockIdx.y * C + c] = sum_gx;
}

// ----------------------------------------------------------------------------- biases and activations

__device__ Int this_thread() { return blockIdx.x * Int(blockDim.x) + threadIdx.x; }

// y = sums + b for every row of sums (N, C), n = N C; y may be sums
template <class Z, class W, class T>
__global__ void add_row(const Z* sums, const W* b, T* y, Int n, Int C) {
    Int i = this_thread();
    if (i < n) y[i] = T(sums[i] + Z(b[i % C]));
}

template <class A> __device__ A sigmoid(A x) { return 1 / (1 + exp(-x)); }

// GELU(x) = x P with P = sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3), if TANH, else the normal distribution.
template <bool TANH, class A> __device__ A gelu_of(A x) {
    const A linear = 1.5957691216057308, cubic = 0.044715 * 1.5957691216057308, root_half = 0.7071067811865476;
    if (TANH) return x * sigmoid(x * (linear + cubic * x * x));
    return x * (A(0.5) * (1 + erf(x * root_half)));
}

// P + x dP/dx
template <bool TANH, class A> __device__ A gelu_slope(A x) {
    const A linear = 1.5957691216057308, cubic = 0.044715 * 1.5957691216057308, root_half = 0.7071067811865476;
    const A density = 0.3989422804014327;  // 1 / sqrt(2 pi)
    if (TANH) {
        A s = sigmoid(x * (linear + cubic * x * x));
        return s + x * s * (1 - s) * (linear + 3 * cubic * x * x);
    }
    return A(0.5) * (1 + erf(x * root_half)) + x * density * exp(A(-0.5) * x * x);
}

// y = GELU(x) of n elements
template <bool TANH, class T, class A = typename Computed<T>::In>
__global__ void gelu(const T* x, T* y, Int n) {
    Int i = this_thread();
    if (i < n) y[i] = T(gelu_of<TANH>(A(x[i])));
}

template <bool TANH, class T, class A = typename Computed<T>::In>
__global__ void gelu_back(const T* x, const T* g, T* dx, Int n) {
    Int i = this_thread();
    if (i < n) dx[i] = T(A(g[i]) * gelu_slope<TANH>(A(x[i])));
}

// y = f(a) u of n elements each: f is GELU in its tanh form, else silu(x) = x sigmoid(x)
template <bool GELU, class T, class A = typename Computed<T>::In>
__global__ void gated(const T* a, const T* u, T* y, Int n) {
    Int i = this_thread();
    if (i >= n) return;
    A x = A(a[i]);
    y[i] = T((GELU ? gelu_of<true>(x) : x * sigmoid(x)) * A(u[i]));
}

template <bool GELU, class T, class A = typename Computed<T>::In>
__global__ void gated_back(const T* a, const T* u, const T* g, T* da, T* du, Int n) {
    Int i = this_thread();
    if (i >= n) return;
    A x = A(a[i]), s = sigmoid(x);
    du[i] = T(A(g[i]) * (GELU ? gelu_of<true>(x) : x * s));
    da[i] = T(A(g[i]) * A(u[i]) * (GELU ? gelu_slope<true>(x) : s + x * s * (1 - s)));
}

// y = (a cos - b sin, b cos + a sin) for the halves a, b of x (B, H, T, 2 half), read with strides sb, sh, st and
// written contiguously; cos and sin are (T, half), or (B, T, half) with cb = T half. sign = -1 rotates back.
template <class T, class A = typename Computed<T>::In>
__global__ void rope(const T* x, Int sb, Int sh, Int st, const A* cos, const A* sin, Int cb, T* y, Int n, Int H,
                     Int times, Int half, double sign) {
    Int i = this_thread();
    if (i >= n) return;  // n = B H T half: one thread per pair
    Int c = i % half, t = i / half % times, h = i / (half * times) % H, b = i / (half * times * H);
    x += b * sb + h * sh + t * st + c;
    y += ((b * H + h) * times + t) * 2 * half + c;
    A first = A(x[0]), second = A(x[half]);
    A cosine = cos[b * cb + t * half + c], sine = A(sign) * sin[b * cb + t * half + c];
    y[0] = T(first * cosine - second * sine);
    y[half] = T(second * cosine + first * sine);
}

// -------------------------------------------------------------------------------------- dropout, attention

// 1 where an element is kept, else 0. Philox4x64-10, bit-exact with numpy.random.Philox (Salmon et al., SC 2011,
// section 3): counter value 1 + start + e / EACH gives 256 random bits for EACH elements e, 16 or 32 bits each.
// `kept` has `parts` parts of `size` elements; part i has the counter word numbers[i].
template <bool FINE>
__global__ void dropout_mask(unsigned char* kept, const Int* numbers, Int parts, Int size, Int threshold, Bits seed,
                             Bits step, Bits op, Int start) {
    const Int BITS = FINE ? 32 : 16, WORD = 64 / BITS, EACH = 4 * WORD;
    Int groups = (size + EACH - 1) / EACH, i = this_thread();
    if (i >= parts * groups) return;
    Int part = i / groups, first = i % groups * EACH;
    Bits c[4] = {Bits(start + first / EACH + 1), Bits(numbers[part]), op, 0};
    for (int round = 0; round < 10; round++) {
        const Bits M0 = 0xD2E7470EE14C6C93, M1 = 0xCA5A826395121157;
        Bits high0 = __umul64hi(M0, c[0]), low0 = M0 * c[0], high1 = __umul64hi(M1, c[2]), low1 = M1 * c[2];
        c[0] = high1 ^ c[1] ^ seed, c[1] = low1, c[2] = high0 ^ c[3] ^ step, c[3] = low0;
        seed += 0x9E3779B97F4A7C15, step += 0xBB67AE8584CAA73B;
    }
    for (int e = 0; e < EACH && first + e < size; e++)
        kept[part * size + first + e] = Int(c[e / WORD] >> (BITS * (e % WORD)) & ((Bits(1) << BITS) - 1)) >= threshold;
}

// The position of a block of scores: queries first, first + 1, ... of (B, H, times) against `seen` of S keys, the
// first of which is number `start`. A query sees the last `window` keys (0: all), and scores are capped at softcap
// (0: not). The mask is `allowed` (boolean) or `added`, with strides mb, mh, mt, ms.
template <class A> struct Scores {
    Int H, times, S, first, rows, start, seen, causal, window;
    A softcap;
};

template <class A> struct Mask {
    const unsigned char* allowed;
    const A* added;
    Int b, h, t, s;
};

// The capped and masked score of one row and key of a block: -inf where the mask excludes the key.
template <class A>
__device__ A masked(A score, const Scores<A>& of, const Mask<A>& mask, Int row, Int key) {
    Int t = of.first + row % of.rows, h = row / of.rows % of.H, b = row / of.rows / of.H;
    key += of.start;
    Int at = b * mask.b + h * mask.h + t * mask.t + key * mask.s, last = t + of.S - of.times;
    if (of.causal && key > last) return -INFINITY;
    if (of.window && key <= last - of.window) return -INFINITY;
    if (mask.allowed && !mask.allowed[at]) return -INFINITY;
    if (of.softcap > 0) score = of.softcap * tanh(score / of.softcap);
    return mask.added ? score + mask.added[at] : score;
}

// p = softmax(scores) of every row, times the dropout mask. A row whose keys are all masked is zero. Stores
// the largest score of each row and sum exp(scores - largest) in sums (B, H, times, 2): the logarithm of the sum of
// exp(scores) would lose that sum beside a large score.
template <class T, class A = typename Computed<T>::In>
__global__ void attention(const A* scores, T* p, A* sums, const unsigned char* kept, double keep_scale,
                          const unsigned char* allowed, const A* added, Int mb, Int mh, Int mt, Int ms, Int H,
                          Int times, Int S, Int first, Int rows, Int start, Int seen, Int causal, Int window,
                          double softcap) {
    const Scores<A> of = {H, times, S, first, rows, start, seen, causal, window, A(softcap)};
    const Mask<A> mask = {allowed, added, mb, mh, mt, ms};
    Int row = blockIdx.x;
    scores += row * seen, p += row * seen;
    A largest = -INFINITY;
    for (Int s = threadIdx.x; s < seen; s += blockDim.x)
        largest = Maximum::of(largest, masked(scores[s], of, mask, row, s));
    A peak = over_block<Maximum>(largest, A(-INFINITY));
    peak = peak == -INFINITY ? A(0) : peak;  // then all weights are exp(-inf) = 0
    A total = 0;
    for (Int s = threadIdx.x; s < seen; s += blockDim.x) total += exp(masked(scores[s], of, mask, row, s) - peak);
    total = sum_over_block(total);
    total = total == 0 ? A(1) : total;
    for (Int s = threadIdx.x; s < seen; s += blockDim.x) {
        A weight = exp(masked(scores[s], of, mask, row, s) - peak) / total;
        p[s] = T(kept ? weight * kept[row * seen + s] * A(keep_scale) : weight);
    }
    sums += 2 * (row / rows * times + first + row % rows);
    if (threadIdx.x == 0) sums[0] = peak, sums[1] = total;
}

// ds = p (kept keep_scale dp - delta), where dp is the gradient of the weights that multiply V, kept keep_scale p.
// Those weights are written too, for dV. ds, which may be null, is the gradient of a bias added to the scores, and
// dz = ds (1 - tanh^2) that of the scores before they were capped.
template <class T, class A = typename Computed<T>::In>
__global__ void attention_back(const A* scores, const A* dp, T* p, T* ds, T* dz, const A* sums, const A* delta,
                               const unsigned char* kept, double keep_scale, const unsigned char* allowed,
                               const A* added, Int mb, Int mh, Int mt, Int ms, Int H, Int times, Int S, Int first,
                               Int rows, Int start, Int seen, Int causal, Int window, double softcap) {
    const Scores<A> of = {H, times, S, first, rows, start, seen, causal, window, A(softcap)};
    const Mask<A> mask = {allowed, added, mb, mh, mt, ms};
    Int row = blockIdx.x, query = row / rows * times + first + row % rows;
    for (Int s = threadIdx.x; s < seen; s += blockDim.x) {
        Int i = row * seen + s;
        A weight = exp(masked(scores[i], of, mask, row, s) - sums[2 * query]) / sums[2 * query + 1];
        A kept_scale = kept ? kept[i] * A(keep_scale) : A(1);
        A ratio = of.softcap > 0 ? tanh(scores[i] / of.softcap) : A(0);
        A d = weight * (dp[i] * kept_scale - delta[query]);
        p[i] = T(weight * kept_scale);
        if (ds) ds[i] = T(d);
        dz[i] = T(d * (1 - ratio * ratio));
    }
}

// out = sum over e of a b for every row of a and b (N, E): delta of the attention gradient
template <class T, class A = typename Computed<T>::In>
__global__ void row_dot(const T* a, const T* b, A* out, Int E) {
    Int row = blockIdx.x;
    A total = 0;
    for (Int e = threadIdx.x; e < E; e += blockDim.x) total += A(a[row * E + e]) * A(b[row * E + e]);
    total = sum_over_block(total);
    if (threadIdx.x == 0) out[row] = total;
}

// ------------------------------------------------------------------------------------- loss, embedding

// For every row of logits (N, V): the loss log(sum exp z) - z[target], times the row's weight (1 if weights is
// null), and the gradient (p - onehot) weight factor; both are 0 if the target is `ignored`. The gradient may
// overwrite the logits. The rows of both are `stride` elements apart. With a softcap c > 0 the logits are
// z = c tanh(y / c) of the given y, and the gradient is that of y.
template <class A> __device__ A capped(A y, double softcap) {
    return softcap > 0 ? A(softcap) * tanh(y / A(softcap)) : y;
}

template <class Z, class T, class A = typename Computed<Z>::In>
__global__ void cross_entropy(const Z* logits, const Int* targets, const A* weights, A* losses, T* gradient, Int V,
                              Int stride, Int ignored, double factor, double softcap) {
    Int row = blockIdx.x, target = targets[row];
    const Z* z = logits + row * stride;
    A largest = -INFINITY, total = 0;
    for (Int v = threadIdx.x; v < V; v += blockDim.x) largest = Maximum::of(largest, A(z[v]));
    A peak = capped(over_block<Maximum>(largest, A(-INFINITY)), softcap);  // the cap keeps the order
    for (Int v = threadIdx.x; v < V; v += blockDim.x) total += exp(capped(A(z[v]), softcap) - peak);
    total = sum_over_block(total);
    bool counts = target != ignored;
    A weight = weights ? weights[row] : A(1);
    if (threadIdx.x == 0) losses[row] = counts ? (log(total) + peak - capped(A(z[target]), softcap)) * weight : A(0);
    __syncthreads();  // z[target] must be read before it may be overwritten
    for (Int v = threadIdx.x; v < V; v += blockDim.x) {
        A at_v = capped(A(z[v]), softcap), p = exp(at_v - peak) / total;
        A slope = softcap > 0 ? 1 - at_v / A(softcap) * (at_v / A(softcap)) : A(1);
        gradient[row * stride + v] = T(counts ? (p - (v == target)) * (weight * A(factor)) * slope : A(0));
    }
}

// dW[ids[order[i]]] += g[order[i]] (n, C) for ids in ascending order. The block of the first of several equal ids
// sums the rows of all of them in order, so that no two blocks write to the same row.
template <class T, class W, class A = typename Computed<W>::In>
__global__ void embedding_back(const Int* sorted_ids, const Int* order, const T* g, W* dw, Int n, Int C) {
    Int first = blockIdx.x, id = sorted_ids[first];
    if (first > 0 && sorted_ids[first - 1] == id) return;
    for (Int c = threadIdx.x; c < C; c += blockDim.x) {
        A total = 0;
        for (Int i = first; i < n && sorted_ids[i] == id; i++) total += A(g[order[i] * C + c]);
        dw[id * C + c] = W(A(dw[id * C + c]) + total);
    }
}

// ------------------------------------------------------------------------------------- many arrays at once

// A model has hundreds of parameters, most of them small, and one launch processes all of them. Block i processes
// `chunk` elements of array number blocks[2 i], starting at blocks[2 i + 1]. `pointers` and `sizes` are the arrays'
// addresses and sizes.

template <class T>
__device__ T* part_of(const Int* pointers, const Int* blocks) {
    return (T*)pointers[blocks[2 * blockIdx.x]] + blocks[2 * blockIdx.x + 1];
}

__device__ Int length_of_part(const Int* sizes, const Int* blocks, Int chunk) {
    Int left = sizes[blocks[2 * blockIdx.x]] - blocks[2 * blockIdx.x + 1];
    return left < chunk ? left : chunk;
}

// sums[i] = sum of squares of part i, in double, as a float would lose small squares in a large sum
template <class T>
__global__ void sum_of_squares(const Int* pointers, const Int* sizes, const Int* blocks, Int chunk, double* sums) {
    const T* x = part_of<const T>(pointers, blocks);
    Int n = length_of_part(sizes, blocks, chunk);
    double total = 0;
    for (Int i = threadIdx.x; i < n; i += blockDim.x) total += double(x[i]) * double(x[i]);
    total = sum_over_block(total);
    if (threadIdx.x == 0) sums[blockIdx.x] = total;
}

// x *= factor
template <class T>
__global__ void scale(const Int* pointers, const Int* sizes, const Int* blocks, Int chunk, double factor) {
    T* x = part_of<T>(pointers, blocks);
    Int n = length_of_part(sizes, blocks, chunk);
    for (Int i = threadIdx.x; i < n; i += blockDim.x) x[i] = T(x[i] * T(factor));
}

// One step of AdamW. Both bias corrections are folded into step_size and eps; (step_size, eps, decay) of array j
// are numbers[3 j], ... `pointers` has four lists in a row: parameters, gradients, m, v.
template <class T>
__global__ void adamw(const Int* pointers, const Int* sizes, const Int* blocks, Int chunk, Int arrays,
                      const double* numbers, double beta1, double beta2) {
    T* theta = part_of<T>(pointers, blocks);
    const T* g = part_of<const T>(pointers + arrays, blocks);
    T* m = part_of<T>(pointers + 2 * arrays, blocks);
    T* v = part_of<T>(pointers + 3 * arrays, blocks);
    numbers += 3 * blocks[2 * blockIdx.x];
    T step_size = numbers[0], eps = numbers[1], decay = numbers[2];
    Int n = length_of_part(sizes, blocks, chunk);
    for (Int i = threadIdx.x; i < n; i += blockDim.x) {
        m[i] = T(beta1) * m[i] + T(1 - beta1) * g[i];
        v[i] = T(beta2) * v[i] + T(1 - beta2) * g[i] * g[i];  // g * g may overflow in float
        theta[i] = theta[i] * decay - step_size * (m[i] / (sqrt(v[i]) + eps));
    }
}
