/* A stand-in for libcuda: it keeps the driver's rules, and computes nothing but a doubling "kernel".
 *
 * Work in a stream is done when somebody waits for it and not before; a capture records it and does none of it;
 * a graph does it at each launch. A call without a current context fails with 201, an allocation during a
 * capture with 900, and memory is what host memory is, at 64-bit addresses. Where cuda.h is there, the compiler
 * holds these functions against it. */
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__has_include) && __has_include(<cuda.h>)
#include <cuda.h>
#else
typedef int CUresult, CUdevice, CUdevice_attribute, CUstreamCaptureMode;
typedef unsigned long long CUdeviceptr, cuuint64_t;
typedef struct ctx *CUcontext;
typedef struct stream *CUstream;
typedef struct graph *CUgraph;
typedef struct exec *CUgraphExec;
typedef struct module *CUmodule;
typedef struct function *CUfunction;
typedef int CUstreamCaptureStatus, CUpointer_attribute;
#define cuDeviceTotalMem cuDeviceTotalMem_v2
#define cuMemGetInfo cuMemGetInfo_v2
#define cuDevicePrimaryCtxRelease cuDevicePrimaryCtxRelease_v2
#define cuCtxPushCurrent cuCtxPushCurrent_v2
#define cuCtxPopCurrent cuCtxPopCurrent_v2
#define cuStreamDestroy cuStreamDestroy_v2
#define cuStreamBeginCapture cuStreamBeginCapture_v2
#define cuMemAlloc cuMemAlloc_v2
#define cuMemFree cuMemFree_v2
#define cuMemHostGetDevicePointer cuMemHostGetDevicePointer_v2
#define cuMemcpyHtoDAsync cuMemcpyHtoDAsync_v2
#define cuMemcpyDtoHAsync cuMemcpyDtoHAsync_v2
#endif
#define R(code) return (CUresult)(code)
enum { OUT_OF_MEMORY = 2, INVALID_CONTEXT = 201, INVALID_HANDLE = 400, UNSUPPORTED = 900, INVALIDATED = 901 };
enum { MOST = 4096 };

typedef struct { void *to; const void *from; size_t size; int kernel; } Work;
typedef struct { Work work[MOST]; int count; } List;
typedef struct { void *start; size_t size; int host; } Block;

/* What tests read and set. */
int64_t fake_room = 1 << 30, fake_held, fake_blocks, fake_retained, fake_streams, fake_graphs, fake_launches,
        fake_copies, fake_integrated, fake_stream_status, fake_bad_frees, fake_kernels, fake_flags;
int64_t fake_poison_capture, fake_lame_graphs;

static List waiting, captured;
static List *graphs[MOST];
static int graph_count, capturing, invalid;
static pthread_t capturer;
static Block blocks[MOST];
static __thread void *current[16];
static __thread int depth;
static char context, stream;

#define IN_CONTEXT if (depth == 0 || current[depth - 1] != &context) R(INVALID_CONTEXT)

void fake_reset(void) {
  fake_room = 1 << 30;
  fake_held = fake_blocks = fake_retained = fake_streams = fake_graphs = fake_launches = fake_copies = 0;
  fake_integrated = fake_stream_status = fake_bad_frees = fake_kernels = fake_flags = fake_poison_capture = fake_lame_graphs = 0;
  waiting.count = captured.count = graph_count = capturing = invalid = 0;
  memset(blocks, 0, sizeof blocks);
  depth = 0;
}

static int allocate(void **pointer, size_t size, int host) {
  if (capturing && pthread_equal(pthread_self(), capturer)) { invalid = 1; return UNSUPPORTED; }
  if (size == 0 || fake_held + (int64_t)size > fake_room) return OUT_OF_MEMORY;
  for (int i = 0; i < MOST; i++)
    if (!blocks[i].start) {
      void *start = NULL;
      if (posix_memalign(&start, 256, size)) return OUT_OF_MEMORY;
      memset(start, 0xA5, size); /* nobody may count on zeros */
      blocks[i] = (Block){start, size, host};
      fake_held += (int64_t)size, fake_blocks++;
      *pointer = start;
      return 0;
    }
  return OUT_OF_MEMORY;
}

static int release(void *start, int host) {
  for (int i = 0; i < MOST; i++)
    if (start && blocks[i].start == start && blocks[i].host == host) {
      fake_held -= (int64_t)blocks[i].size, fake_blocks--;
      memset(start, 0xDD, blocks[i].size); /* a later use shows */
      free(start);
      blocks[i].start = NULL;
      return 0;
    }
  fake_bad_frees++;
  return INVALID_HANDLE;
}

static int put(CUstream where, Work work) {
  if (where != (CUstream)&stream) return INVALID_HANDLE;
  List *list = capturing ? &captured : &waiting;
  if (list->count == MOST) return OUT_OF_MEMORY;
  list->work[list->count++] = work;
  return 0;
}

static void do_all(List *list) {
  for (int i = 0; i < list->count; i++) {
    Work w = list->work[i];
    if (!w.kernel) { memcpy(w.to, w.from, w.size); fake_copies++; continue; }
    fake_kernels++;
    for (size_t n = 0; n < w.size / sizeof(float); n++) ((float *)w.to)[n] = 2 * ((const float *)w.from)[n];
  }
}

int capturing_now(void) { return capturing; }

/* The kernel that a stand-in for TensorRT puts into the stream. */
int fake_double(void *where, uint64_t to, uint64_t from, size_t size) {
  return put((CUstream)where, (Work){(void *)to, (const void *)from, size, 1});
}

CUresult cuInit(unsigned int flags) { (void)flags; R(0); }
CUresult cuDriverGetVersion(int *version) { *version = 13000; R(0); }
CUresult cuGetErrorString(CUresult code, const char **text) { (void)code; *text = "a stand-in's error"; R(0); }
CUresult cuDeviceGetCount(int *count) { *count = 1; R(0); }
CUresult cuDeviceGet(CUdevice *device, int ordinal) { *device = ordinal; R(0); }
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute which, CUdevice device) {
  (void)device;
  *value = which == 18 ? (int)fake_integrated : which == 19 ? 1 : which == 75 ? 8 : which == 76 ? 7 : 0;
  R(0);
}
CUresult cuDevicePrimaryCtxRetain(CUcontext *made, CUdevice device) {
  (void)device;
  *made = (CUcontext)&context, fake_retained++;
  R(0);
}
CUresult cuDevicePrimaryCtxRelease(CUdevice device) { (void)device; fake_retained--; R(0); }
CUresult cuCtxPushCurrent(CUcontext one) {
  if (depth == 16) R(OUT_OF_MEMORY);
  current[depth++] = one;
  R(0);
}
CUresult cuCtxPopCurrent(CUcontext *one) {
  if (depth == 0) R(INVALID_CONTEXT);
  *one = current[--depth];
  R(0);
}
CUresult cuStreamCreate(CUstream *made, unsigned int flags) {
  IN_CONTEXT;
  if (fake_stream_status) R(fake_stream_status);
  fake_flags = flags;
  *made = (CUstream)&stream, fake_streams++;
  R(0);
}
CUresult cuStreamDestroy(CUstream one) { IN_CONTEXT; (void)one; fake_streams--; R(0); }
CUresult cuStreamSynchronize(CUstream one) {
  IN_CONTEXT;
  if (one != (CUstream)&stream) R(INVALID_HANDLE);
  if (capturing) { invalid = 1; R(UNSUPPORTED); }
  do_all(&waiting);
  waiting.count = 0;
  R(0);
}
CUresult cuStreamBeginCapture(CUstream one, CUstreamCaptureMode mode) {
  IN_CONTEXT;
  if (one != (CUstream)&stream || mode != 1) R(INVALID_HANDLE);
  capturing = 1, invalid = 0, captured.count = 0, capturer = pthread_self();
  R(0);
}
CUresult cuStreamEndCapture(CUstream one, CUgraph *graph) {
  IN_CONTEXT;
  (void)one;
  capturing = 0;
  *graph = NULL;
  if (invalid || fake_poison_capture) R(INVALIDATED);
  graphs[graph_count] = malloc(sizeof(List));
  memcpy(graphs[graph_count], &captured, sizeof(List));
  *graph = (CUgraph)graphs[graph_count++];
  fake_graphs++;
  R(0);
}
CUresult cuGraphInstantiateWithFlags(CUgraphExec *made, CUgraph graph, unsigned long long flags) {
  IN_CONTEXT;
  (void)flags;
  List *copy = malloc(sizeof(List));
  memcpy(copy, (void *)graph, sizeof(List));
  *made = (CUgraphExec)copy, fake_graphs++;
  R(0);
}
CUresult cuGraphLaunch(CUgraphExec exec, CUstream where) {
  IN_CONTEXT;
  fake_launches++;
  for (int i = 0; i < ((List *)exec)->count; i++) {
    Work work = ((List *)exec)->work[i];
    if (fake_lame_graphs && work.kernel) continue;
    int status = put(where, work);
    if (status) R(status);
  }
  R(0);
}
CUresult cuGraphDestroy(CUgraph graph) { IN_CONTEXT; free((void *)graph); fake_graphs--; R(0); }
CUresult cuGraphExecDestroy(CUgraphExec exec) { IN_CONTEXT; free((void *)exec); fake_graphs--; R(0); }
CUresult cuMemAlloc(CUdeviceptr *pointer, size_t size) {
  IN_CONTEXT;
  void *start = NULL;
  int status = allocate(&start, size, 0);
  *pointer = (CUdeviceptr)(uintptr_t)start;
  R(status);
}
CUresult cuMemFree(CUdeviceptr pointer) { IN_CONTEXT; R(release((void *)(uintptr_t)pointer, 0)); }
CUresult cuMemHostAlloc(void **pointer, size_t size, unsigned int flags) {
  IN_CONTEXT;
  R(allocate(pointer, size, 1 + (int)(flags & 2)));
}
CUresult cuMemFreeHost(void *pointer) {
  IN_CONTEXT;
  for (int i = 0; i < MOST; i++)
    if (pointer && blocks[i].start == pointer && blocks[i].host) R(release(pointer, blocks[i].host));
  fake_bad_frees++;
  R(INVALID_HANDLE);
}
CUresult cuMemHostGetDevicePointer(CUdeviceptr *address, void *pointer, unsigned int flags) {
  IN_CONTEXT;
  (void)flags;
  for (int i = 0; i < MOST; i++)
    if (blocks[i].start == pointer && blocks[i].host == 3) { *address = (CUdeviceptr)(uintptr_t)pointer; R(0); }
  R(INVALID_HANDLE);
}
CUresult cuMemcpyHtoDAsync(CUdeviceptr to, const void *from, size_t size, CUstream where) {
  IN_CONTEXT;
  R(put(where, (Work){(void *)(uintptr_t)to, from, size, 0}));
}
CUresult cuMemcpyDtoHAsync(void *to, CUdeviceptr from, size_t size, CUstream where) {
  IN_CONTEXT;
  R(put(where, (Work){to, (const void *)(uintptr_t)from, size, 0}));
}
CUresult cuDeviceGetName(char *name, int room, CUdevice device) {
  (void)device;
  strncpy(name, "a stand-in", (size_t)room);
  R(0);
}
CUresult cuDeviceGetPCIBusId(char *address, int room, CUdevice device) {
  (void)device;
  strncpy(address, "0000:00:1E.0", (size_t)room);
  R(0);
}
CUresult cuDeviceTotalMem(size_t *size, CUdevice device) { (void)device; *size = (size_t)fake_room; R(0); }
CUresult cuMemGetInfo(size_t *left, size_t *total) {
  IN_CONTEXT;
  *left = (size_t)(fake_room - fake_held), *total = (size_t)fake_room;
  R(0);
}
CUresult cuStreamIsCapturing(CUstream one, CUstreamCaptureStatus *status) {
  IN_CONTEXT;
  (void)one;
  *status = (CUstreamCaptureStatus)capturing;
  R(0);
}
CUresult cuPointerGetAttribute(void *value, CUpointer_attribute which, CUdeviceptr pointer) {
  for (int i = 0; i < MOST; i++)
    if (blocks[i].start == (void *)(uintptr_t)pointer && which == 2) {
      *(unsigned int *)value = blocks[i].host ? 1 : 2;
      R(0);
    }
  R(1);
}
CUresult cuModuleLoadData(CUmodule *made, const void *text) { IN_CONTEXT; *made = (CUmodule)text; R(0); }
CUresult cuModuleGetFunction(CUfunction *found, CUmodule module, const char *name) {
  (void)module;
  *found = (CUfunction)&context;
  R(strcmp(name, "twice") ? 500 : 0);
}
CUresult cuLaunchKernel(CUfunction one, unsigned int x, unsigned int y, unsigned int z, unsigned int threads,
                        unsigned int ty, unsigned int tz, unsigned int shared, CUstream where, void **given,
                        void **extra) {
  IN_CONTEXT;
  (void)one, (void)y, (void)z, (void)ty, (void)tz, (void)shared, (void)extra;
  uint64_t count = *(uint64_t *)given[2];
  if (x * (uint64_t)threads < count) R(1);
  R(fake_double((void *)where, *(uint64_t *)given[0], *(uint64_t *)given[1], count * sizeof(float)));
}
