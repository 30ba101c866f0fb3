/* tests/emu/emu_mma.cpp: mma and ldmatrix with the fragment layouts of the PTX ISA.
 *
 * The layouts are in core/base/cuda_instr.h. Products of bf16 or tf32 values are exact in fp32;
 * sums are fp32 in rising k, after the accumulator. The hardware sums in another order and may
 * truncate, so tolerances must leave room for both.
 */
#include "tests/emu/emu_impl.h"

namespace {
struct mma_lane {
    float *d;
    const uint32_t *a, *b;
};

struct matrix_lane {
    uint32_t *r;
    const void *row;
};

float bf16_half(uint32_t u, int upper)
{
    return __uint_as_float(upper ? u & 0xffff0000u : u << 16);
}

float tf32_value(uint32_t u)
{
    return __uint_as_float(u & 0xffffe000u);
}

/* d (16 x 8) += a (16 x K) b (K x 8) */
template <int K>
void multiply(void **lanes, const float (&a)[16][K], const float (&b)[K][8])
{
    float c[16][8];
    for (int l = 0; l < 32; l++)
        for (int i = 0; i < 4; i++)
            c[l / 4 + 8 * (i / 2)][2 * (l % 4) + i % 2] = static_cast<mma_lane *>(lanes[l])->d[i];
    for (int m = 0; m < 16; m++)
        for (int k = 0; k < K; k++)
            for (int n = 0; n < 8; n++) c[m][n] += a[m][k] * b[k][n];
    for (int l = 0; l < 32; l++)
        for (int i = 0; i < 4; i++)
            static_cast<mma_lane *>(lanes[l])->d[i] = c[l / 4 + 8 * (i / 2)][2 * (l % 4) + i % 2];
}

void work_bf16(void **lanes, unsigned)
{
    float a[16][16], b[16][8];
    for (int l = 0; l < 32; l++) {
        const auto *p = static_cast<const mma_lane *>(lanes[l]);
        for (int i = 0; i < 4; i++)
            for (int h = 0; h < 2; h++)
                a[l / 4 + 8 * (i % 2)][2 * (l % 4) + h + 8 * (i / 2)] = bf16_half(p->a[i], h);
        for (int i = 0; i < 2; i++)
            for (int h = 0; h < 2; h++) b[2 * (l % 4) + h + 8 * i][l / 4] = bf16_half(p->b[i], h);
    }
    multiply<16>(lanes, a, b);
}

void work_tf32(void **lanes, unsigned)
{
    float a[16][8], b[8][8];
    for (int l = 0; l < 32; l++) {
        const auto *p = static_cast<const mma_lane *>(lanes[l]);
        for (int i = 0; i < 4; i++)
            a[l / 4 + 8 * (i % 2)][l % 4 + 4 * (i / 2)] = tf32_value(p->a[i]);
        for (int i = 0; i < 2; i++) b[l % 4 + 4 * i][l / 4] = tf32_value(p->b[i]);
    }
    multiply<8>(lanes, a, b);
}

template <int N, bool kTrans>
void work_ldmatrix(void **lanes, unsigned)
{
    for (int i = 0; i < N; i++) {
        uint16_t m[8][8];
        for (int row = 0; row < 8; row++)
            memcpy(m[row], static_cast<const matrix_lane *>(lanes[8 * i + row])->row, 16);
        for (int l = 0; l < 32; l++) {
            const int g = l / 4, t = 2 * (l % 4);
            const uint16_t lo = kTrans ? m[t][g] : m[g][t], hi = kTrans ? m[t + 1][g] : m[g][t + 1];
            static_cast<matrix_lane *>(lanes[l])->r[i] = (uint32_t)hi << 16 | lo;
        }
    }
}

template <int N, bool kTrans>
void ldmatrix(uint32_t *r, const void *row, const char *file, int line)
{
    struct matrix_lane mine = { r, row };

    if (ht_emu_self->lane < 8 * N) {
        if ((uintptr_t)row % 16 != 0)
            ht_emu_error("ldmatrix at %s:%d: a row at %p; it must be 16-byte aligned", file, line,
                         row);
        emu_shared_read(row, 16, file, line);
    }
    ht_emu_collective(0xffffffffu, &mine, work_ldmatrix<N, kTrans>, "ldmatrix", file, line);
}
} // namespace

void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const char *file,
              int line)
{
    struct mma_lane mine = { d, a, b };
    ht_emu_collective(0xffffffffu, &mine, work_bf16, "mma", file, line);
}

void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const char *file,
              int line)
{
    struct mma_lane mine = { d, a, b };
    ht_emu_collective(0xffffffffu, &mine, work_tf32, "mma", file, line);
}

uint32_t to_tf32(float v)
{
    const uint32_t u = __float_as_uint(v);
    if ((u & 0x7f800000u) == 0x7f800000u) return u; // infinity, NaN
    return (u + 0x1000u) & 0xffffe000u;             // to nearest, ties away from zero
}

void ldmatrix_x4(uint32_t (&r)[4], const void *row, const char *file, int line)
{
    ldmatrix<4, false>(r, row, file, line);
}

void ldmatrix_x4_trans(uint32_t (&r)[4], const void *row, const char *file, int line)
{
    ldmatrix<4, true>(r, row, file, line);
}

void ldmatrix_x2(uint32_t (&r)[2], const void *row, const char *file, int line)
{
    ldmatrix<2, false>(r, row, file, line);
}

void ldmatrix_x2_trans(uint32_t (&r)[2], const void *row, const char *file, int line)
{
    ldmatrix<2, true>(r, row, file, line);
}
