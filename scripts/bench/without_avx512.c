/* Answers for a processor without AVX-512, VNNI and AMX. Preloaded by without_avx512.py, which has put a
 * trap (int3) where ONNX Runtime asks with CPUID; and /proc/cpuinfo is read from $WITHOUT_AVX512. */
#define _GNU_SOURCE
#include <cpuid.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

/* Leaf 7: bits of EBX (F, DQ, IFMA, PF, ER, CD, BW, VL), ECX (VBMI, VBMI2, VNNI, BITALG, VPOPCNTDQ) and
 * EDX (4VNNIW, 4FMAPS, VP2INTERSECT, AMX-BF16, AVX512-FP16, AMX-TILE, AMX-INT8). Its subleaf 1: bits of
 * EAX (AVX-VNNI, AVX512-BF16, AMX-FP16, AVX-IFMA) and EDX (AVX-VNNI-INT8, AVX-NE-CONVERT, AVX-VNNI-INT16). */
#define BIT(n) (1u << (n))
static const unsigned EBX_7 = BIT(16) | BIT(17) | BIT(21) | BIT(26) | BIT(27) | BIT(28) | BIT(30) | BIT(31);
static const unsigned ECX_7 = BIT(1) | BIT(6) | BIT(11) | BIT(12) | BIT(14);
static const unsigned EDX_7 = BIT(2) | BIT(3) | BIT(8) | BIT(22) | BIT(23) | BIT(24) | BIT(25);
static const unsigned EAX_7_1 = BIT(4) | BIT(5) | BIT(21) | BIT(23);
static const unsigned EDX_7_1 = BIT(4) | BIT(5) | BIT(10);

static void answer(int signal_number, siginfo_t *info, void *context)
{
    greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
    unsigned leaf = (unsigned)registers[REG_RAX], subleaf = (unsigned)registers[REG_RCX], a, b, c, d;
    (void)signal_number, (void)info;
    __cpuid_count(leaf, subleaf, a, b, c, d);
    if (leaf == 7 && subleaf == 0)
        b &= ~EBX_7, c &= ~ECX_7, d &= ~EDX_7;
    if (leaf == 7 && subleaf == 1)
        a &= ~EAX_7_1, d &= ~EDX_7_1;
    registers[REG_RAX] = a, registers[REG_RBX] = b, registers[REG_RCX] = c, registers[REG_RDX] = d;
}

__attribute__((constructor)) static void install(void)
{
    struct sigaction action = {.sa_sigaction = answer, .sa_flags = SA_SIGINFO | SA_NODEFER};
    sigaction(SIGTRAP, &action, NULL);
}

static const char *instead(const char *path)
{
    const char *other = getenv("WITHOUT_AVX512");
    return other && strcmp(path, "/proc/cpuinfo") == 0 ? other : path;
}

#define OPENED(name)                                                                 \
    int name(const char *path, int flags, ...)                                       \
    {                                                                                \
        static int (*original)(const char *, int, ...);                              \
        va_list rest;                                                                \
        va_start(rest, flags);                                                       \
        int mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, int) : 0;            \
        va_end(rest);                                                                \
        if (!original)                                                               \
            original = (int (*)(const char *, int, ...))dlsym(RTLD_NEXT, #name);     \
        return original(instead(path), flags, mode);                                 \
    }

OPENED(open)
OPENED(open64)
