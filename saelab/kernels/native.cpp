// Sparse kernels for CPUs; native.py compiles this file and loads it with ctypes.
//
// Every function computes what the function of the same name in eager.py computes (`traced` is
// `trace_above` there, `combine` is `decode`). Tensors are contiguous and row-major. Each output
// element is computed by one thread in a fixed order, so that the bits do not depend on the number
// of threads. Memory access dominates: rows are gathered once, as a whole, and the next row is
// prefetched while the current one is processed.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <type_traits>
#include <vector>

#ifdef __AVX512BW__
#include <immintrin.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

using i64 = std::int64_t;
// Floats in a vector register: wider types than the processor's are kept in memory by the compiler.
#if defined(__AVX512F__)
constexpr i64 WIDE = 16;
#elif defined(__AVX__)
constexpr i64 WIDE = 8;
#else
constexpr i64 WIDE = 4;
#endif
constexpr i64 BLOCK = 64;  // values compared at once

typedef float Vec __attribute__((vector_size(WIDE * sizeof(float)), aligned(4)));

inline Vec load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
inline void store(float* p, Vec v) { *reinterpret_cast<Vec*>(p) = v; }

typedef float Quarter __attribute__((vector_size(4 * sizeof(float))));

inline float sum_of_four(Quarter q) { return (q[0] + q[2]) + (q[1] + q[3]); }

inline float sum(Vec v) {
#if defined(__AVX512F__)
    typedef float Half __attribute__((vector_size(8 * sizeof(float))));
    const Half h = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
                   __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
    return sum_of_four(__builtin_shufflevector(h, h, 0, 1, 2, 3) +
                       __builtin_shufflevector(h, h, 4, 5, 6, 7));
#elif defined(__AVX__)
    return sum_of_four(__builtin_shufflevector(v, v, 0, 1, 2, 3) +
                       __builtin_shufflevector(v, v, 4, 5, 6, 7));
#else
    return sum_of_four(v);
#endif
}

// ---------------------------------------------------------------- gathers
//
// A strip is V vectors of every row: few enough that the sums and one row stay in registers. A row
// of d floats is processed in strips, and the rest float by float.

constexpr int WIDEST = 12;
// Partial sums of a product alone, each of which waits for its own last addition only; beside the
// sums of a strip there are registers for two.
constexpr int PARTS = 32 / WIDE, PARTS_BESIDE_SUMS = 2;
constexpr int WIDEST_ALONE = WIDE == 8 ? 8 : WIDEST;  // 16 registers with AVX2, 32 elsewhere

inline void prefetch(const float* row, int vectors) {
    for (int v = 0; v < vectors; ++v) __builtin_prefetch(row + v * WIDE, 0, 3);
}

// Calls work(width, start) for each strip of d floats: width vectors from start; 0 means one float.
template <int Widest = WIDEST, typename Work>
inline void strips(i64 d, Work work) {
    i64 at = 0;
    while (d - at >= WIDE) {
        const int width = static_cast<int>(std::min<i64>(Widest, (d - at) / WIDE));
        work(width, at);
        at += width * WIDE;
    }
    for (; at < d; ++at) work(0, at);
}

// Turns a width that is known at run time into a template argument: calls
// run(integral_constant<int, width>).
template <int V = WIDEST, typename Run>
inline void with_width(int width, Run run) {
    if constexpr (V > 0) {
        if (width == V)
            run(std::integral_constant<int, V>{});
        else
            with_width<V - 1>(width, run);
    }
}

// Computes out = sum_j weight(j) * table[index[j]] over one strip of a bag.
template <int V, typename Weight>
inline void gather_strip(Weight weight, const i64* index, i64 begin, i64 end, const float* table,
                         i64 d, float* out) {
    Vec sums[V] = {};
    for (i64 j = begin; j < end; ++j) {
        const float* row = table + index[j] * d;
        if (j + 2 < end) prefetch(table + index[j + 2] * d, V);
        const float w = weight(j);
        for (int v = 0; v < V; ++v) sums[v] += w * load(row + v * WIDE);
    }
    for (int v = 0; v < V; ++v) store(out + v * WIDE, sums[v]);
}

template <typename Weight>
void gather(Weight weight, const i64* index, i64 begin, i64 end, const float* table, i64 d,
            float* out) {
    strips(d, [&](int width, i64 at) {
        if (width == 0) {
            float total = 0;
            for (i64 j = begin; j < end; ++j) total += weight(j) * table[index[j] * d + at];
            out[at] = total;
        }
        with_width(width, [&](auto v) {
            gather_strip<v()>(weight, index, begin, end, table + at, d, out + at);
        });
    });
}

// Computes, for one latent and over one strip, products[order[j]] += <a[rows[j]], w> and, if
// WithSum, the sum share * w + sum_j values[order[j]] * a[rows[j]]; both from one read of a.
template <int V, bool WithSum>
inline void product_strip(const float* a, i64 d, const float* w, const float* values,
                          const i64* order, const i64* rows, i64 begin, i64 end, float* products,
                          float share, float* sum_out) {
    Vec own[V], sums[V];
    for (int v = 0; v < V; ++v) own[v] = load(w + v * WIDE);
    for (int v = 0; v < V; ++v) sums[v] = share * own[v];
    for (i64 j = begin; j < end; ++j) {
        const float* row = a + rows[j] * d;
        if (j + 2 < end) prefetch(a + rows[j + 2] * d, V);
        const float value = WithSum ? values[order[j]] : 0.0f;
        constexpr int N = WithSum ? PARTS_BESIDE_SUMS : PARTS;
        Vec parts[N] = {};
        for (int v = 0; v < V; ++v) {
            const Vec x = load(row + v * WIDE);
            parts[v % N] += own[v] * x;
            if constexpr (WithSum) sums[v] += value * x;
        }
        for (int n = N / 2; n > 0; n /= 2)
            for (int i = 0; i < n; ++i) parts[i] += parts[i + n];
        products[order[j]] += sum(parts[0]);
    }
    if constexpr (WithSum)
        for (int v = 0; v < V; ++v) store(sum_out + v * WIDE, sums[v]);
}

template <bool WithSum>
void products_of_latent(const float* a, i64 d, const float* w, const float* values,
                        const i64* order, const i64* rows, i64 begin, i64 end, float* products,
                        float share, float* sum_out) {
    constexpr int WIDTH = WithSum ? WIDEST : WIDEST_ALONE;
    strips<WIDTH>(d, [&](int width, i64 at) {
        if (width == 0) {
            float total = share * w[at];
            for (i64 j = begin; j < end; ++j) {
                const float x = a[rows[j] * d + at];
                products[order[j]] += w[at] * x;
                if constexpr (WithSum) total += values[order[j]] * x;
            }
            if constexpr (WithSum) sum_out[at] = total;
        }
        with_width<WIDTH>(width, [&](auto v) {
            product_strip<v(), WithSum>(a + at, d, w + at, values, order, rows, begin, end,
                                        products, share, WithSum ? sum_out + at : nullptr);
        });
    });
}

inline float row_dot(const float* a, const float* b, i64 d) {
    Vec even = {}, odd = {};
    i64 i = 0;
    for (; i + 2 * WIDE <= d; i += 2 * WIDE) {
        even += load(a + i) * load(b + i);
        odd += load(a + i + WIDE) * load(b + i + WIDE);
    }
    float rest = 0;
    for (; i < d; ++i) rest += a[i] * b[i];
    return sum(even + odd) + rest;
}

// Computes y += scale * x.
inline void add_scaled(float scale, const float* x, float* y, i64 d) {
    i64 i = 0;
    for (; i + WIDE <= d; i += WIDE) store(y + i, load(y + i) + scale * load(x + i));
    for (; i < d; ++i) y[i] += scale * x[i];
}

constexpr int TOGETHER = 4;  // rows that share each read of v and of the sum

// Computes along[r] = <x[r], v> for R rows.
template <int R>
inline void products_of_rows(const float* x, const float* v, i64 d, float* along) {
    Vec sums[R] = {};
    float rest[R] = {};
    i64 i = 0;
    for (; i + WIDE <= d; i += WIDE) {
        const Vec w = load(v + i);
        for (int r = 0; r < R; ++r) sums[r] += load(x + r * d + i) * w;
    }
    for (; i < d; ++i)
        for (int r = 0; r < R; ++r) rest[r] += x[r * d + i] * v[i];
    for (int r = 0; r < R; ++r) along[r] = sum(sums[r]) + rest[r];
}

// Computes y += sum_r weights[r] * along[r] * x[r] over R rows.
template <int R>
inline void add_rows(const float* x, const float* weights, const float* along, i64 d, float* y) {
    float scale[R];
    for (int r = 0; r < R; ++r) scale[r] = weights[r] * along[r];
    i64 i = 0;
    for (; i + WIDE <= d; i += WIDE) {
        Vec total = load(y + i);
        for (int r = 0; r < R; ++r) total += scale[r] * load(x + r * d + i);
        store(y + i, total);
    }
    for (; i < d; ++i)
        for (int r = 0; r < R; ++r) y[i] += scale[r] * x[r * d + i];
}

// Computes y[rows[j]] += values[order[j]] * w for the pairs of one latent.
inline void scatter_latent(const float* w, const float* values, const i64* order, const i64* rows,
                           i64 begin, i64 end, i64 d, float* y) {
    for (i64 j = begin; j < end; ++j) add_scaled(values[order[j]], w, y + rows[j] * d, d);
}

// ---------------------------------------------------------------- selection

inline float widen(float z) { return z; }
inline float widen(std::uint16_t z) {
    const std::uint32_t bits = static_cast<std::uint32_t>(z) << 16;
    float out;
    std::memcpy(&out, &bits, sizeof out);
    return out;
}

// Packs 64 flags that are 0 or 1 into one bit each.
inline std::uint64_t bits_of(const std::uint8_t* flag) {
#ifdef __AVX512BW__
    return _mm512_test_epi8_mask(_mm512_load_si512(flag), _mm512_set1_epi8(1));
#else
    std::uint64_t bits = 0;
    for (int i = 0; i < 8; ++i) {
        std::uint64_t bytes;
        std::memcpy(&bytes, flag + 8 * i, sizeof bytes);
        bits |= (bytes * 0x0102040810204080u >> 56) << (8 * i);
    }
    return bits;
#endif
}

// Calls found(i) for every i in [0, n) for which above(i) is true, in rising order; `above` is
// vectorised.
template <typename Above, typename Found>
inline void scan(i64 n, Above above, Found found) {
    alignas(64) std::uint8_t flag[BLOCK];
    for (i64 start = 0; start < n; start += BLOCK) {
        if (n - start >= BLOCK) {
            for (i64 i = 0; i < BLOCK; ++i) flag[i] = above(start + i);
        } else {
            for (i64 i = 0; i < BLOCK; ++i) flag[i] = start + i < n && above(start + i);
        }
        for (std::uint64_t bits = bits_of(flag); bits; bits &= bits - 1)
            found(start + __builtin_ctzll(bits));
    }
}

// Maps values to integers of the same order; NaN is larger than all numbers.
inline std::int32_t key(float z) {
    std::int32_t bits;
    std::memcpy(&bits, &z, sizeof bits);
    return bits ^ ((bits >> 31) & 0x7fffffff);
}
inline std::int16_t key(std::uint16_t z) {
    const auto bits = static_cast<std::int16_t>(z);
    return static_cast<std::int16_t>(bits ^ ((bits >> 15) & 0x7fff));
}

template <typename T>
struct Scratch {
    using Key = decltype(key(T{}));
    std::vector<Key> keys, tops, survivors;
    std::vector<i64> places, chosen;
    // What the row before says of this one: a key that about twice k of its keys reach.
    Key hint = std::numeric_limits<Key>::max();
};

// Collects places and keys of those that reach `floor`; returns their number.
template <typename T, typename Key>
i64 collect(Scratch<T>& s, i64 n, Key floor) {
    const Key* keys = s.keys.data();
    Key* survivors = s.survivors.data();
    i64 *places = s.places.data(), found = 0;
    scan(
        n, [&](i64 i) { return keys[i] >= floor; },
        [&](i64 i) {
            places[found] = i;
            survivors[found++] = keys[i];
        });
    return found;
}

// Returns the rank-th largest of n keys, counted from 1, bit by bit: the largest number that so many
// keys reach. Nothing branches on the keys, whose order no processor can foresee.
template <typename Key>
Key ranked(const Key* keys, i64 n, i64 rank) {
    using Bits = std::make_unsigned_t<Key>;
    constexpr Bits SIGN = Bits(1) << (8 * sizeof(Key) - 1);
    Key lowest = keys[0], highest = keys[0];
    for (i64 i = 1; i < n; ++i) {
        lowest = std::min(lowest, keys[i]);
        highest = std::max(highest, keys[i]);
    }
    const Bits low = Bits(lowest) ^ SIGN, high = Bits(highest) ^ SIGN;
    if (low == high) return lowest;
    const int unequal = 64 - __builtin_clzll(static_cast<std::uint64_t>(low ^ high));
    Bits found = unequal == 8 * sizeof(Key) ? 0 : Bits(low >> unequal << unequal);
    for (int bit = unequal - 1; bit >= 0; --bit) {
        const Bits trial = found | Bits(Bits(1) << bit);
        const Key least = static_cast<Key>(trial ^ SIGN);
        std::int32_t reach = 0;
        for (i64 i = 0; i < n; ++i) reach += keys[i] >= least;
        found = reach >= rank ? trial : found;
    }
    return static_cast<Key>(found ^ SIGN);
}

// Finds the k-th largest of the n keys of a row, and collects places and keys of at least those that
// reach it; returns their number.
template <typename T, typename Key>
i64 find_cut(Scratch<T>& s, i64 n, i64 k, Key& cut) {
    const i64 groups = (2 * k + BLOCK - 1) / BLOCK * BLOCK;
    s.survivors.resize(n), s.places.resize(n);
    const Key* keys = s.keys.data();
    i64 found = s.hint == std::numeric_limits<Key>::max() ? 0 : collect(s, n, s.hint);
    if (found < k) {
        // The k-th largest of the maxima of strided groups is no larger than the k-th largest value.
        Key floor = std::numeric_limits<Key>::min();
        if (groups < n) {
            s.tops.assign(keys, keys + groups);
            Key* tops = s.tops.data();
            i64 start = groups;
            for (; start + groups <= n; start += groups)
                for (i64 i = 0; i < groups; ++i) tops[i] = std::max(tops[i], keys[start + i]);
            for (i64 i = 0; start + i < n; ++i) tops[i] = std::max(tops[i], keys[start + i]);
            floor = ranked(tops, groups, k);
        }
        found = collect(s, n, floor);
        s.hint = floor;
    }
    const Key* survivors = s.survivors.data();
    if (found > 3 * k) s.hint = ranked(survivors, found, 2 * k);
    cut = ranked(survivors, found, k);
    return found;
}

// Calls keep(j) for the k largest of `found` keys, in their order; ties go to the first.
template <typename Key, typename Keep>
void keep_largest(const Key* survivors, i64 found, i64 k, Key cut, Keep keep) {
    i64 ties = k;
    for (i64 j = 0; j < found; ++j) ties -= survivors[j] > cut;
    for (i64 j = 0; j < found; ++j) {
        const bool tie = survivors[j] == cut;
        keep(j, (survivors[j] > cut) | (tie & (ties > 0)));
        ties -= tie;
    }
}

// Writes the indices of the k largest of one row in rising order; ties go to the lower index.
template <typename T>
void topk_row(const T* z, i64 n, i64 k, i64* out, Scratch<T>& s) {
    using Key = typename Scratch<T>::Key;
    s.keys.resize(n), s.chosen.resize(n + 1);
    for (i64 i = 0; i < n; ++i) s.keys[i] = key(z[i]);
    Key cut;
    const i64 found = find_cut(s, n, k, cut);
    i64 taken = 0, *chosen = s.chosen.data();
    keep_largest(s.survivors.data(), found, k, cut, [&](i64 j, bool kept) {
        chosen[taken] = s.places[j];
        taken += kept;
    });
    std::copy_n(chosen, k, out);
}

// Returns the bit pattern of a positive value, which rises with the value; 0 for anything else.
inline std::uint32_t pattern(float z) {
    std::uint32_t bits;
    std::memcpy(&bits, &z, sizeof bits);
    return z > 0 ? bits : 0;
}
inline std::uint32_t pattern(std::uint16_t z) { return z < 0x8000 ? std::uint32_t(z) << 16 : 0; }

constexpr i64 BINS = 1 << 15;  // upper halves of the patterns of positive floats

// Counts positive values by the upper half of their pattern. If `upper` is given, counts only those
// with this upper half, by their lower half. Patterns below `least` are skipped.
template <typename T>
std::vector<i64> histogram(const T* z, i64 n, std::uint32_t least, i64 upper, int threads) {
    const i64 bins = upper < 0 ? BINS : 2 * BINS;
    std::vector<i64> counts(bins * threads);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int t = 0; t < threads; ++t) {
        i64* count = counts.data() + bins * t;
        const i64 begin = n * t / threads, end = n * (t + 1) / threads;
        const T* part = z + begin;
        scan(
            end - begin, [&](i64 i) { return pattern(part[i]) >= least; },
            [&](i64 i) {
                const std::uint32_t bits = pattern(part[i]);
                if (upper < 0)
                    ++count[bits >> 16];
                else if (bits >> 16 == upper)
                    ++count[bits & 0xffff];
            });
    }
    for (int t = 1; t < threads; ++t)
        for (i64 i = 0; i < bins; ++i) counts[i] += counts[bins * t + i];
    counts.resize(bins);
    return counts;
}

// Returns the bin that holds the rank-th largest value, or 0; rank becomes the rank in that bin.
inline i64 bin_of(const std::vector<i64>& counts, i64& rank) {
    for (i64 bin = static_cast<i64>(counts.size()) - 1; bin > 0; --bin) {
        if (counts[bin] >= rank) return bin;
        rank -= counts[bin];
    }
    return 0;
}

template <typename T>
float kth_largest(const T* z, i64 n, i64 rank, int threads) {
    // A sample of the values gives a pattern below which nothing need be counted; if the sample
    // misleads, all values are counted.
    std::uint32_t least = 1;
    i64 expected = rank / 16 * 2 + 64;
    if (n / 16 > expected) {
        const auto counts = histogram(z, n / 16, 1, -1, threads);
        least = std::max<std::uint32_t>(1, std::uint32_t(bin_of(counts, expected)) << 16);
    }
    i64 left = rank;
    i64 bin = bin_of(histogram(z, n, least, -1, threads), left);
    if (bin == 0 && least > 1) {
        left = rank;
        bin = bin_of(histogram(z, n, 1, -1, threads), left);
    }
    std::uint32_t bits = std::uint32_t(bin) << 16;
    if (sizeof(T) == sizeof(float)) {
        const auto counts = histogram(z, n, std::max<std::uint32_t>(1, bits), bin, threads);
        bits |= std::uint32_t(bin_of(counts, left));
    }
    float out;
    std::memcpy(&out, &bits, sizeof out);
    return out;
}

// Returns whether a pre-activation lies above its latent's floor, or above 0 without floors.
inline bool passes(float z, const float* floor, i64 i) { return z > floor[i]; }
inline bool passes(std::uint16_t z, const float* floor, i64 i) { return widen(z) > floor[i]; }
inline bool passes(float z) { return z > 0; }
inline bool passes(std::uint16_t z) { return static_cast<std::int16_t>(z) > 0; }  // same sign

// Writes the latents of rows [first, last) to `latents` as far as there is room; scan_row(n, keep)
// calls keep(i) for those of row n. Returns the number of pairs; offsets[n + 1] becomes their number
// up to and including row n.
template <typename ScanRow>
i64 select_rows(ScanRow scan_row, i64 first, i64 last, i64 room, i64* offsets, i64* latents) {
    i64 count = 0;
    for (i64 n = first; n < last; ++n) {
        scan_row(n, [&](i64 i) {
            if (count < room) latents[count] = i;
            ++count;
        });
        offsets[n + 1] = count;
    }
    return count;
}

// Each thread fills its own part of `latents`; the parts are then moved together. Returns the number
// of pairs; if it exceeds `room`, the latents are undefined.
template <typename ScanRow>
i64 select(ScanRow scan_row, i64 rows, i64 room, int threads, i64* offsets, i64* latents) {
    std::vector<i64> counts(threads);
    bool overflow = false;
    offsets[0] = 0;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int t = 0; t < threads; ++t) {
        const i64 start = room * t / threads, own = room * (t + 1) / threads - start;
        counts[t] = select_rows(scan_row, rows * t / threads, rows * (t + 1) / threads, own,
                                offsets, latents + start);
#pragma omp critical
        overflow |= counts[t] > own;
    }
    i64 total = 0;
    for (int t = 0; t < threads; ++t) total += counts[t];
    if (total > room) return total;
    if (overflow) return select_rows(scan_row, 0, rows, room, offsets, latents);
    total = counts[0];
    for (int t = 1; t < threads; ++t) {
        std::memmove(latents + total, latents + room * t / threads, counts[t] * sizeof(i64));
        for (i64 n = rows * t / threads; n < rows * (t + 1) / threads; ++n) offsets[n + 1] += total;
        total += counts[t];
    }
    return total;
}

template <typename T>
i64 above(const T* z, const float* floor, i64 rows, i64 d_sae, i64 room, int threads,
          i64* offsets, i64* latents) {
    const auto scan_row = [=](i64 n, auto keep) {
        const T* row = z + n * d_sae;
        if (floor)
            scan(d_sae, [&](i64 i) { return passes(row[i], floor, i); }, keep);
        else
            scan(d_sae, [&](i64 i) { return passes(row[i]); }, keep);
    };
    return select(scan_row, rows, room, threads, offsets, latents);
}

// ---------------------------------------------------------------- int8 products

// Rounds one row to whole multiples of its scale, at most `limit` of them. Also computes the norms of
// the row and of what rounding leaves out. A row of zeros has the scale 1.
struct Quantised {
    float scale, norm, error;
};

inline float within(float x, float limit) {  // limit where x is NaN
    const float low = x > -limit ? x : -limit;
    return low < limit ? low : limit;
}

inline Quantised quantise_row(const float* __restrict x, const float* __restrict columns, i64 d,
                              float limit, std::int8_t* __restrict q) {
    float most = 0, squares = 0, left = 0;
#pragma omp simd reduction(max : most)
    for (i64 j = 0; j < d; ++j) {
        const float size = std::abs(x[j] * columns[j]);
        most = size > most ? size : most;
    }
    const float scale = most > 0 ? most / limit : 1, per = 1 / scale;
#pragma omp simd reduction(+ : squares, left)
    for (i64 j = 0; j < d; ++j) {
        const float value = x[j] * columns[j], exact = value * per;
        const auto steps =
            static_cast<std::int32_t>(within(exact + (exact < 0 ? -0.5f : 0.5f), limit));
        const float lost = value - scale * static_cast<float>(steps);
        q[j] = static_cast<std::int8_t>(steps);
        squares += value * value;
        left += lost * lost;
    }
    return {scale, std::sqrt(squares), std::sqrt(left)};
}

// ---------------------------------------------------------------- adapting thresholds

// The fields of eager.Adaptation, in its order; each has one value per latent.
struct Rule {
    const float *base, *slope, *low, *margin, *fire, *per_sd, *rest, *rho;
};

Rule rule_of(const float* rules, i64 d_sae) {
    const auto row = [&](i64 i) { return rules + i * d_sae; };
    return {row(0), row(1), row(2), row(3), row(4), row(5), row(6), row(7)};
}

// The pairs of a range of latents, row by row, with the trace and its derivative before the row.
// Pairs beyond `room` are only counted.
struct Traced {
    i64 room, *ends, *latents;
    float *trace, *slope;
};

template <typename T>
inline float drive_of(const T* z, const Rule& rule, i64 i) {
    const float value = widen(z[i]), scaled = value * rule.per_sd[i];  // no branch: vectorised
    return value > rule.fire[i] ? scaled : 0.0f;
}

// Adds one row of z to the sums of z, z^2 and the drive.
template <typename T>
__attribute__((noinline)) void add_moments(const T* __restrict z, const Rule& rule, i64 first, i64 last,
                 float* __restrict sums, float* __restrict squares, float* __restrict drives) {
    for (i64 i = first; i < last; ++i) {
        const float value = widen(z[i]);
        sums[i] += value;
        squares[i] += value * value;
        drives[i] += drive_of(z, rule, i);
    }
}

// Advances the trace and its derivative by one position; with weight 0 the trace only decays.
template <typename T>
__attribute__((noinline)) void advance(const T* __restrict z, const Rule& rule, float weight, i64 first, i64 last,
             float* __restrict a, float* __restrict s) {
    for (i64 i = first; i < last; ++i) {
        const float r = weight * (drive_of(z, rule, i) - rule.rest[i]), before = a[i - first];
        s[i - first] = before + rule.rho[i] * s[i - first] - r;
        a[i - first] = rule.rho[i] * before + (1 - rule.rho[i]) * r;
    }
}

// Processes all segments for the latents [first, last); moments are sums of z, z^2 and the drive.
// Returns the number of pairs; out.ends[n] becomes their number up to and including row n.
template <typename T>
i64 trace_range(const T* z, const Rule& rule, const i64* starts, const i64* drivers, i64 segments,
                i64 d_sae, i64 first, i64 last, float* moments, const Traced& out) {
    i64 count = 0;
    std::vector<float> a(last - first), s(last - first);
    float *sums = moments, *squares = moments + d_sae, *drives = moments + 2 * d_sae;
    for (i64 g = 0; g < segments; ++g) {
        std::fill(a.begin(), a.end(), 0.0f);
        std::fill(s.begin(), s.end(), 0.0f);
        const i64 begin = starts[g], source = starts[drivers[g]];
        const i64 length = starts[drivers[g] + 1] - source;
        for (i64 n = begin; n < starts[g + 1]; ++n) {
            const T* row = z + n * d_sae;
            const float* now = a.data() - first;
            const auto passes_here = [row, now, rule, first](i64 j) {
                const i64 i = first + j;
                const float threshold = rule.base[i] + rule.slope[i] * now[i];
                return widen(row[i]) > std::max(threshold, rule.low[i]) - rule.margin[i];
            };
            scan(last - first, passes_here, [&](i64 j) {
                if (count < out.room) {
                    out.latents[count] = first + j;
                    out.trace[count] = a[j];
                    out.slope[count] = s[j];
                }
                ++count;
            });
            out.ends[n] = count;
            add_moments(row, rule, first, last, sums, squares, drives);
            if (n + 1 == starts[g + 1]) break;
            const bool driven = n - begin < length;
            const T* other = z + (driven ? source + n - begin : n) * d_sae;
            advance(other, rule, driven ? 1.0f : 0.0f, first, last, a.data(), s.data());
        }
    }
    return count;
}

// Each thread takes a range of latents; the ranges of a row are then joined. Returns the number of
// pairs; if it exceeds `room`, not all of them are stored.
template <typename T>
i64 traced(const T* z, const Rule& rule, const i64* starts, const i64* drivers, i64 segments,
           i64 d_sae, i64 room, int threads, float* moments, i64* offsets, i64* latents,
           float* trace, float* slope) {
    offsets[0] = 0;
    std::fill(moments, moments + 3 * d_sae, 0.0f);
    if (threads == 1) {
        const Traced out{room, offsets + 1, latents, trace, slope};
        return trace_range(z, rule, starts, drivers, segments, d_sae, 0, d_sae, moments, out);
    }
    const i64 rows = starts[segments];
    std::vector<std::unique_ptr<i64[]>> whole(2 * threads);
    std::vector<std::unique_ptr<float[]>> real(2 * threads);
    std::vector<Traced> parts(threads);
    std::vector<i64> counts(threads);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int t = 0; t < threads; ++t) {
        whole[2 * t].reset(new i64[rows]), whole[2 * t + 1].reset(new i64[room]);
        real[2 * t].reset(new float[room]), real[2 * t + 1].reset(new float[room]);
        parts[t] = {room, whole[2 * t].get(), whole[2 * t + 1].get(), real[2 * t].get(),
                    real[2 * t + 1].get()};
        counts[t] = trace_range(z, rule, starts, drivers, segments, d_sae, d_sae * t / threads,
                                d_sae * (t + 1) / threads, moments, parts[t]);
    }
    i64 total = std::accumulate(counts.begin(), counts.end(), i64{0});
    if (total > room) return total;
    total = 0;
    for (i64 n = 0; n < rows; ++n) {
        for (const auto& part : parts) {
            const i64 from = n ? part.ends[n - 1] : 0, count = part.ends[n] - from;
            std::copy_n(part.latents + from, count, latents + total);
            std::copy_n(part.trace + from, count, trace + total);
            std::copy_n(part.slope + from, count, slope + total);
            total += count;
        }
        offsets[n + 1] = total;
    }
    return total;
}

}  // namespace

extern "C" {

i64 firings(const float* values, const i64* latents, i64 nnz, i64 d_sae, i64* out) {
    std::fill(out, out + d_sae, 0);
    i64 active = 0;
    for (i64 j = 0; j < nnz; ++j) {
        const bool fires = values[j] != 0;
        out[latents[j]] += fires;
        active += fires;
    }
    return active;
}

void project_out(float* g, const float* w, i64 rows, i64 d, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (i64 n = 0; n < rows; ++n) {
        const float along = row_dot(g + n * d, w + n * d, d);
        add_scaled(-along, w + n * d, g + n * d, d);
    }
}

void normalise(float* w, i64 rows, i64 d, float smallest, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (i64 n = 0; n < rows; ++n) {
        float* row = w + n * d;
        const float norm = std::max(std::sqrt(row_dot(row, row, d)), smallest);
        for (i64 i = 0; i < d; ++i) row[i] /= norm;
    }
}

void gram_product(const float* z, const float* weights, const float* v, i64 rows, i64 d,
                  float* along, float* out) {
    std::fill(out, out + d, 0.0f);
    i64 n = 0;
    for (; n + TOGETHER <= rows; n += TOGETHER) {
        products_of_rows<TOGETHER>(z + n * d, v, d, along + n);
        add_rows<TOGETHER>(z + n * d, weights + n, along + n, d, out);
    }
    for (; n < rows; ++n) {
        products_of_rows<1>(z + n * d, v, d, along + n);
        add_rows<1>(z + n * d, weights + n, along + n, d, out);
    }
}

void pool(const float* values, const i64* offsets, const i64* latents, const i64* cuts,
          i64 segments, i64 d_sae, float* sums) {
    for (i64 s = 0; s < segments; ++s)
        for (i64 j = offsets[cuts[s]]; j < offsets[cuts[s + 1]]; ++j)
            sums[s * d_sae + latents[j]] += values[j];
}

void encode(const float* u, const float* w, const float* bias, const i64* order, const i64* rows,
            const i64* starts, i64 d_sae, i64 d, int threads, float* out) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 64) if (threads > 1)
    for (i64 i = 0; i < d_sae; ++i) {
        for (i64 j = starts[i]; j < starts[i + 1]; ++j) out[order[j]] = bias ? bias[i] : 0.0f;
        products_of_latent<false>(u, d, w + i * d, nullptr, order, rows, starts[i], starts[i + 1],
                                  out, 0.0f, nullptr);
    }
}

void encode_backward(const float* g, const float* u, const i64* order, const i64* rows,
                     const i64* starts, i64 d_sae, i64 d, int threads, float* g_w, float* g_b) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 64) if (threads > 1)
    for (i64 i = 0; i < d_sae; ++i) {
        float total = 0;
        for (i64 j = starts[i]; j < starts[i + 1]; ++j) total += g[order[j]];
        g_b[i] = total;
        gather([&](i64 j) { return g[order[j]]; }, rows, starts[i], starts[i + 1], u, d,
               g_w + i * d);
    }
}

void combine(const float* values, const i64* offsets, const i64* latents, const float* w, i64 rows,
             i64 d, int threads, float* out) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 16) if (threads > 1)
    for (i64 n = 0; n < rows; ++n)
        gather([&](i64 j) { return values[j]; }, latents, offsets[n], offsets[n + 1], w, d,
               out + n * d);
}

// Computes the sums of `combine` in the order of latents, for outputs that fit the cache if w does
// not.
void combine_by_latent(const float* values, const i64* order, const i64* rows, const i64* starts,
                       const float* w, i64 d_sae, i64 n_rows, i64 d, float* out) {
    std::fill(out, out + n_rows * d, 0.0f);
    for (i64 i = 0; i < d_sae; ++i)
        scatter_latent(w + i * d, values, order, rows, starts[i], starts[i + 1], d, out);
}

void decode_backward(const float* g, const float* values, const float* w, const float* shares,
                     const i64* order, const i64* rows, const i64* starts, i64 d_sae, i64 d,
                     int threads, float* g_values, float* g_w) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 64) if (threads > 1)
    for (i64 i = 0; i < d_sae; ++i) {
        for (i64 j = starts[i]; j < starts[i + 1]; ++j) g_values[order[j]] = 0.0f;
        products_of_latent<true>(g, d, w + i * d, values, order, rows, starts[i], starts[i + 1],
                                 g_values, shares ? shares[i] : 0.0f, g_w + i * d);
    }
}

void by_latent(const i64* offsets, const i64* latents, i64 rows, i64 d_sae, i64* order,
               i64* rows_out, i64* offsets_out) {
    const i64 nnz = offsets[rows];
    std::fill(offsets_out, offsets_out + d_sae + 1, 0);
    for (i64 j = 0; j < nnz; ++j) ++offsets_out[latents[j] + 1];
    for (i64 i = 0; i < d_sae; ++i) offsets_out[i + 1] += offsets_out[i];
    std::vector<i64> next(offsets_out, offsets_out + d_sae);
    for (i64 n = 0; n < rows; ++n)
        for (i64 j = offsets[n]; j < offsets[n + 1]; ++j) {
            const i64 at = next[latents[j]]++;
            order[at] = j;
            rows_out[at] = n;
        }
}

i64 above_bfloat16(const std::uint16_t* z, const float* floor, i64 rows, i64 d_sae, i64 room,
                   int threads, i64* offsets, i64* latents) {
    return above(z, floor, rows, d_sae, room, threads, offsets, latents);
}

i64 above_float32(const float* z, const float* floor, i64 rows, i64 d_sae, i64 room, int threads,
                  i64* offsets, i64* latents) {
    return above(z, floor, rows, d_sae, room, threads, offsets, latents);
}

i64 traced_bfloat16(const std::uint16_t* z, const float* rules, const i64* starts, const i64* drivers,
                    i64 segments, i64 d_sae, i64 room, int threads, float* moments,
                    i64* offsets, i64* latents, float* trace, float* slope) {
    return traced(z, rule_of(rules, d_sae), starts, drivers, segments, d_sae, room, threads,
                  moments, offsets, latents, trace, slope);
}

i64 traced_float32(const float* z, const float* rules, const i64* starts, const i64* drivers,
                   i64 segments, i64 d_sae, i64 room, int threads, float* moments,
                   i64* offsets, i64* latents, float* trace, float* slope) {
    return traced(z, rule_of(rules, d_sae), starts, drivers, segments, d_sae, room, threads,
                  moments, offsets, latents, trace, slope);
}

void quantise(const float* x, const float* columns, i64 rows, i64 d, float limit, int threads,
              std::int8_t* q, float* scale, float* norm, float* error) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (i64 n = 0; n < rows; ++n) {
        const Quantised row = quantise_row(x + n * d, columns, d, limit, q + n * d);
        scale[n] = row.scale, norm[n] = row.norm, error[n] = row.error;
    }
}

i64 screened(const std::int32_t* product, const float* of_rows, const float* of_latents, i64 rows,
             i64 d_sae, i64 room, int threads, i64* offsets, i64* latents) {
    const float *least = of_latents, *norm = of_latents + d_sae;
    const auto scan_row = [=](i64 n, auto keep) {
        const std::int32_t* row = product + n * d_sae;
        const float per = of_rows[n], width = of_rows[rows + n], room = of_rows[2 * rows + n];
        const auto may_pass = [=](i64 i) {
            return static_cast<float>(row[i]) > least[i] * per - (norm[i] * width + room);
        };
        scan(d_sae, may_pass, keep);
    };
    return select(scan_row, rows, room, threads, offsets, latents);
}

// Selects what may be among the k largest of a row: those whose upper bound reaches the k-th largest
// lower bound. The bounds of a pair are product * scale + bias * per -+ scale * (norm * width + room),
// in units of the row's scale.
i64 screened_topk(const std::int32_t* product, const float* of_rows, const float* of_latents,
                  i64 rows, i64 d_sae, i64 k, i64 room_for, int threads, i64* offsets,
                  i64* latents) {
    const float *scale = of_latents, *norm = scale + d_sae, *bias = norm + d_sae;
    std::vector<Scratch<float>> scratch(threads);
    const auto scan_row = [&, d_sae, k](i64 n, auto keep) {
#ifdef _OPENMP
        Scratch<float>& s = scratch[threads > 1 ? omp_get_thread_num() : 0];
#else
        Scratch<float>& s = scratch[0];
#endif
        const std::int32_t* row = product + n * d_sae;
        const float per = of_rows[n], width = of_rows[rows + n], room = of_rows[2 * rows + n];
        const auto middle = [=](i64 i) {
            return static_cast<float>(row[i]) * scale[i] + bias[i] * per;
        };
        const auto margin = [=](i64 i) { return scale[i] * (norm[i] * width + room); };
        s.keys.resize(d_sae);
        std::int32_t* keys = s.keys.data();
        for (i64 i = 0; i < d_sae; ++i) keys[i] = key(middle(i) - margin(i));
        std::int32_t cut;
        find_cut(s, d_sae, k, cut);
        scan(d_sae, [=](i64 i) { return key(middle(i) + margin(i)) >= cut; }, keep);
    };
    return select(scan_row, rows, room_for, threads, offsets, latents);
}

// Keeps the pairs with the k largest values of each row; ties go to the lower latent.
void topk_of_pairs(const float* values, const i64* offsets, const i64* latents, i64 rows, i64 k,
                   i64* latents_out, float* out) {
    std::vector<std::int32_t> keys;
    std::vector<i64> chosen;
    for (i64 n = 0; n < rows; ++n) {
        const i64 begin = offsets[n], found = offsets[n + 1] - begin;
        keys.resize(found), chosen.resize(found + 1);
        for (i64 j = 0; j < found; ++j) keys[j] = key(values[begin + j]);
        i64 taken = 0;
        keep_largest(keys.data(), found, k, ranked(keys.data(), found, k), [&](i64 j, bool kept) {
            chosen[taken] = begin + j;
            taken += kept;
        });
        for (i64 j = 0; j < k; ++j) {
            latents_out[n * k + j] = latents[chosen[j]];
            out[n * k + j] = values[chosen[j]];
        }
    }
}

// Keeps the pairs whose value is above the floor of their latent, or the only floor.
i64 keep_above(const float* values, const float* floor, i64 floors, const i64* offsets,
               const i64* latents, i64 rows, i64* offsets_out, i64* latents_out, float* out) {
    i64 kept = 0;
    offsets_out[0] = 0;
    for (i64 n = 0; n < rows; ++n) {
        for (i64 j = offsets[n]; j < offsets[n + 1]; ++j) {
            latents_out[kept] = latents[j];
            out[kept] = values[j];
            kept += values[j] > floor[floors > 1 ? latents[j] : 0];
        }
        offsets_out[n + 1] = kept;
    }
    return kept;
}

void topk_bfloat16(const std::uint16_t* z, i64 rows, i64 d_sae, i64 k, int threads, i64* out) {
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        Scratch<std::uint16_t> scratch;
#pragma omp for schedule(static)
        for (i64 n = 0; n < rows; ++n) topk_row(z + n * d_sae, d_sae, k, out + n * k, scratch);
    }
}

void topk_float32(const float* z, i64 rows, i64 d_sae, i64 k, int threads, i64* out) {
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        Scratch<float> scratch;
#pragma omp for schedule(static)
        for (i64 n = 0; n < rows; ++n) topk_row(z + n * d_sae, d_sae, k, out + n * k, scratch);
    }
}

float kth_largest_bfloat16(const std::uint16_t* z, i64 n, i64 keep, int threads) {
    return kth_largest(z, n, keep, threads);
}

float kth_largest_float32(const float* z, i64 n, i64 keep, int threads) {
    return kth_largest(z, n, keep, threads);
}

}  // extern "C"
