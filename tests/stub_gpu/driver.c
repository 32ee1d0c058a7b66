/* What torch and Triton ask of the driver; all else returns 0. The numbers are a Hopper card's. */
static long something;

int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = 0; return 0; }
int cuCtxGetDevice(int *device) { *device = 0; return 0; }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = 0; *active = 1; return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = &something; return 0; }
int cuCtxGetCurrent(void **context) { *context = &something; return 0; }
int cuModuleLoadData(void **module, const void *image) { *module = &something; return 0; }
int cuModuleGetFunction(void **function, void *module, const char *name) { *function = &something; return 0; }
int cuFuncGetAttribute(int *value, int attribute, void *function) { *value = attribute ? 0 : 1024; return 0; }
int cuPointerGetAttribute(void *value, int attribute, unsigned long pointer) { *(unsigned long *)value = pointer; return 0; }
int cuGetErrorString(int error, const char **text) { *text = "an error of the stub"; return 0; }
int cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks) { *blocks = 2; return 0; }

int cuDeviceGetAttribute(int *value, int attribute, int device) {
  switch (attribute) {
    case 10: *value = 32; break;      /* lanes of a warp */
    case 12: case 82: *value = 65536; break; /* registers of a block, of a multiprocessor */
    case 16: *value = 132; break;     /* multiprocessors */
    case 75: *value = 9; break;       /* capability */
    case 76: *value = 0; break;
    case 81: *value = 233472; break;  /* shared memory of a multiprocessor, and what a block may opt in to */
    case 97: *value = 232448; break;
    default: *value = 0;
  }
  return 0;
}
