/* A CUDA runtime whose device memory is the host's and whose launches do nothing; all else returns 0. */
#define _GNU_SOURCE
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define PAGE 4096
static size_t used;

static size_t whole(void) {
  const char *gib = getenv("STUB_GPU_GIB");
  return (size_t)(gib ? atof(gib) : 64.0) * (1ull << 30);
}

static void *handle(void **to) { return *to = calloc(1, PAGE); }

/* ---- the device */
cudaError_t cudaGetDeviceCount(int *count) { *count = 1; return 0; }
cudaError_t cudaGetDevice(int *device) { *device = 0; return 0; }
cudaError_t cudaSetDevice(int device) { return device ? cudaErrorInvalidDevice : 0; }
cudaError_t cudaDriverGetVersion(int *version) { *version = 13000; return 0; }
cudaError_t cudaRuntimeGetVersion(int *version) { *version = 13000; return 0; }

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *is, int device) {
  memset(is, 0, sizeof *is);
  strcpy(is->name, "no GPU, a stub");
  is->totalGlobalMem = whole();
  is->major = 9;
  is->warpSize = 32;
  is->multiProcessorCount = 132;
  is->maxThreadsPerBlock = is->maxThreadsDim[0] = is->maxThreadsDim[1] = 1024;
  is->maxThreadsDim[2] = 64;
  is->maxGridSize[0] = 2147483647;
  is->maxGridSize[1] = is->maxGridSize[2] = 65535;
  is->maxThreadsPerMultiProcessor = 2048;
  is->maxBlocksPerMultiProcessor = 32;
  is->regsPerBlock = is->regsPerMultiprocessor = 65536;
  is->sharedMemPerBlock = 49152;
  is->sharedMemPerBlockOptin = 232448;
  is->sharedMemPerMultiprocessor = 233472;
  is->l2CacheSize = 60 << 20;
  is->textureAlignment = 512;
  is->unifiedAddressing = 1;
  return 0;
}

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
  struct cudaDeviceProp is;
  cudaGetDeviceProperties(&is, device);
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock: case cudaDevAttrMaxBlockDimX: case cudaDevAttrMaxBlockDimY: *value = 1024; break;
    case cudaDevAttrMaxBlockDimZ: *value = 64; break;
    case cudaDevAttrMaxGridDimX: *value = 2147483647; break;
    case cudaDevAttrMaxGridDimY: case cudaDevAttrMaxGridDimZ: *value = 65535; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = is.sharedMemPerBlock; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = is.sharedMemPerBlockOptin; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = is.sharedMemPerMultiprocessor; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    case cudaDevAttrMaxRegistersPerBlock: case cudaDevAttrMaxRegistersPerMultiprocessor: *value = 65536; break;
    case cudaDevAttrMultiProcessorCount: *value = is.multiProcessorCount; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; break;
    case cudaDevAttrComputeCapabilityMajor: *value = is.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = is.minor; break;
    case cudaDevAttrMaxBlocksPerMultiprocessor: *value = 32; break;
    default: *value = 0;
  }
  return 0;
}

/* ---- memory, of which only what is written takes any; its size lies in the page before it */
cudaError_t cudaMalloc(void **to, size_t bytes) {
  *to = 0;
  if (used + bytes > whole()) return cudaErrorMemoryAllocation;
  char *page = mmap(0, bytes + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (page == MAP_FAILED) return cudaErrorMemoryAllocation;
  *(size_t *)page = bytes;
  used += bytes;
  *to = page + PAGE;
  return 0;
}
cudaError_t cudaMallocManaged(void **to, size_t bytes, unsigned flags) { return cudaMalloc(to, bytes); }
cudaError_t cudaFree(void *block) {
  if (!block) return 0;
  char *page = (char *)block - PAGE;
  size_t bytes = *(size_t *)page;
  used -= bytes;
  munmap(page, bytes + PAGE);
  return 0;
}
cudaError_t cudaHostAlloc(void **to, size_t bytes, unsigned flags) { return posix_memalign(to, PAGE, bytes) ? 2 : 0; }
cudaError_t cudaFreeHost(void *block) { free(block); return 0; }
cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total) { *total = whole(); *free_bytes = *total - used; return 0; }
cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind) { memmove(to, from, bytes); return 0; }
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind, cudaStream_t on) {
  memmove(to, from, bytes);
  return 0;
}
cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t rows,
                              enum cudaMemcpyKind kind, cudaStream_t on) {
  for (size_t row = 0; row < rows; row++) memmove((char *)to + row * to_pitch, (char *)from + row * from_pitch, width);
  return 0;
}
cudaError_t cudaMemset(void *to, int value, size_t bytes) { memset(to, value, bytes); return 0; }
cudaError_t cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t on) { memset(to, value, bytes); return 0; }
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *is, const void *pointer) {
  memset(is, 0, sizeof *is);
  is->type = cudaMemoryTypeDevice;
  is->devicePointer = (void *)pointer;
  return 0;
}
cudaError_t cudaGetSymbolAddress(void **to, const void *symbol) { handle(to); return 0; }

/* ---- streams, events, launches */
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0; *greatest = -5; return 0; }
cudaError_t cudaStreamCreate(cudaStream_t *stream) { handle((void **)stream); return 0; }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) { handle((void **)stream); return 0; }
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) { *priority = 0; return 0; }
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) { *status = 0; return 0; }
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id,
                                     cudaGraph_t *graph, const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges,
                                     size_t *count) {
  *status = 0;
  if (count) *count = 0;
  return 0;
}
cudaError_t cudaEventCreate(cudaEvent_t *event) { handle((void **)event); return 0; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) { handle((void **)event); return 0; }
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t start, cudaEvent_t end) { *ms = 1; return 0; }
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *is, const void *function) {
  memset(is, 0, sizeof *is);
  is->maxThreadsPerBlock = 1024;
  is->numRegs = 32;
  is->ptxVersion = is->binaryVersion = 90;
  return 0;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *function, int threads,
                                                                   size_t shared, unsigned flags) {
  *blocks = 2;
  return 0;
}
cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer) { *can = 0; return 0; }
const char *cudaGetErrorString(cudaError_t error) { return error == cudaErrorMemoryAllocation ? "out of memory" : "an error of the stub"; }
const char *cudaGetErrorName(cudaError_t error) { return "an error of the stub"; }

static int nothing(void) { return 0; }
cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **to, unsigned version, unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult *found) {
  void *driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL), *symbol = driver ? dlsym(driver, name) : 0;
  *to = symbol ? symbol : (void *)nothing;
  if (found) *found = 0;
  return 0;
}

void **__cudaRegisterFatBinary(void *binary) { static void *handles[4]; return handles; }
char __cudaInitModule(void **handles) { return 1; }
cudaError_t __cudaGetKernel(void **kernel, const void *entry) { *kernel = (void *)entry; return 0; }
cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
  memset(grid, 0, sizeof *grid);
  memset(block, 0, sizeof *block);
  *shared = 0;
  *(void **)stream = 0;
  return 0;
}

/* ---- cuBLAS */
int cublasCreate_v2(void **to) { handle(to); return 0; }
int cublasGetMathMode(void *library, int *mode) { *mode = 0; return 0; }
int cublasGetPointerMode_v2(void *library, int *mode) { *mode = 0; return 0; }
int cublasLtMatmulDescCreate(void **to) { handle(to); return 0; }
int cublasLtMatrixLayoutCreate(void **to) { handle(to); return 0; }
int cublasLtMatmulPreferenceCreate(void **to) { handle(to); return 0; }
int cublasLtMatmulAlgoGetHeuristic(void *library, void *product, void *a, void *b, void *c, void *d, void *preference,
                                   int most, void *results, int *found) {
  memset(results, 0, 96);
  *found = 1;
  return 0;
}
