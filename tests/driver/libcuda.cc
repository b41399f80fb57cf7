// A driver of NVIDIA's for tests: the entry points that tokenmill opens, over the SIMT machine.
//
// Device memory is the host's, so addresses work. It is counted against a total as real drivers
// count it: large requests in pages of 2 MiB, small ones together in such pages.
//
// Streams run as late as they may: what is asked for waits in a queue until somebody waits for it.
// So a host that reuses memory before a copy from it has run copies the wrong bytes, and a fault
// of a kernel is reported by a later call. A captured stream's queue is a graph; to launch it is
// to put its parts into the queue. A pointer to anything but live device memory is such a fault.
//
// Rules that real drivers have are kept: no call before cuInit or without a context, no
// allocation and no waiting while this thread captures, no empty grids, no more shared memory
// than was opted into. After a fault every call that concerns the device reports it.
//
//   STUB_CUDA_KERNELS   libraries of kernels for the SIMT machine, separated by colons
//   STUB_CUDA_MEMORY    bytes of device memory (2 GiB)
//   STUB_CUDA_HIDDEN    bytes that somebody else takes right after free memory was asked for
//   STUB_CUDA_DEVICES   devices (1)
//   STUB_CUDA_VERSION   the newest CUDA that the driver supports (13000)
//   STUB_CUDA_FAULT     NAME:N, the Nth run of this kernel reads an illegal address
//   STUB_CUDA_HANG      NAME:N, the Nth run of this kernel never ends
//   STUB_CUDA_TRACE     a file to which allocations, graphs and launches are appended, a line each
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include <dlfcn.h>
#include <sys/mman.h>
#include <unistd.h>

namespace {

enum Result {
  SUCCESS = 0,
  INVALID_VALUE = 1,
  OUT_OF_MEMORY = 2,
  NOT_INITIALIZED = 3,
  NO_DEVICE = 100,
  INVALID_DEVICE = 101,
  INVALID_CONTEXT = 201,
  INVALID_HANDLE = 400,
  NOT_FOUND = 500,
  NOT_READY = 600,
  ILLEGAL_ADDRESS = 700,
  LAUNCH_FAILED = 719,
  CAPTURE_UNSUPPORTED = 900,
  CAPTURE_INVALIDATED = 901,
  CAPTURED_EVENT = 907,
};

constexpr size_t PAGE_BYTES = 2 << 20;
constexpr size_t SMALL_BYTES = 1 << 20;   // smaller requests share pages
constexpr size_t ALIGN_BYTES = 512;
constexpr int SHARED_BYTES = 48 << 10;    // what a kernel may have without opting in
constexpr int SHARED_BYTES_OPTIN = 227 << 10;
constexpr unsigned char POISON = 0xff;    // a NaN, and an index beyond everything
constexpr size_t POISONED_BYTES = 64 << 20;  // of larger requests only the first ones

using Launch = const char* (*)(unsigned, const unsigned*, size_t, void**, uint64_t);
using Describe = const char* (*)(unsigned, const char**);

struct Function {
  std::string name, file, signature;
  unsigned index;
  Launch launch;
  int max_dynamic = SHARED_BYTES;
  size_t runs = 0;
};

struct Module {
  std::string file;   // the kernels of one file, or all of them when empty
};

struct Event {
  bool is_captured = false;
  uint64_t waits_for = 0;   // the number of the stream's work that it marks
  struct Stream* stream = nullptr;
};

struct Work {
  enum Kind { LAUNCH, COPY, FILL, MARK } kind;
  Function* function = nullptr;
  unsigned sizes[6] = {};
  size_t shared_bytes = 0;
  std::vector<uint64_t> arguments;
  uint64_t to = 0, from = 0;
  size_t bytes = 0;
  unsigned char value = 0;
};

struct Stream {
  std::deque<Work> queue;
  uint64_t added = 0, done = 0;
  bool is_capturing = false, is_invalid = false, hangs = false;
  std::vector<Work> captured;
};

struct Graph {
  std::vector<Work> work;
};

struct Wish {
  std::string name;
  size_t number = 0;
};

std::mutex mutex;
bool is_started = false;
int sticky = SUCCESS;
std::vector<std::unique_ptr<Function>> functions;
std::map<uint64_t, size_t> device_memory, host_memory;
size_t large_bytes = 0, small_bytes = 0;
std::vector<Stream*> streams;
Wish fault, hang;
FILE* trace = nullptr;
uint64_t seed = 1;
char the_context;
thread_local void* current = nullptr;
thread_local Stream* capturing = nullptr;

size_t number(const char* variable, size_t otherwise) {
  const char* text = std::getenv(variable);
  return text ? std::strtoull(text, nullptr, 10) : otherwise;
}

Wish wish(const char* variable) {
  const char* text = std::getenv(variable);
  const char* colon = text ? std::strrchr(text, ':') : nullptr;
  if (!colon) return {};
  return {std::string(text, colon), std::strtoull(colon + 1, nullptr, 10)};
}

template <class... Values>
void note(const char* format, Values... values) {
  if (!trace) return;
  std::fprintf(trace, format, values...);
  std::fflush(trace);
}

void load_kernels() {
  const char* list = std::getenv("STUB_CUDA_KERNELS");
  std::string rest = list ? list : "";
  while (!rest.empty()) {
    size_t end = std::min(rest.find(':'), rest.size());
    std::string path = rest.substr(0, end);
    rest.erase(0, std::min(end + 1, rest.size()));
    void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!library) {
      std::fprintf(stderr, "stub libcuda: %s\n", dlerror());
      std::abort();
    }
    auto describe = reinterpret_cast<Describe>(dlsym(library, "simt_kernel"));
    auto launch = reinterpret_cast<Launch>(dlsym(library, "simt_launch"));
    std::string file = path.substr(path.rfind('/') + 1);
    file = file.substr(0, file.rfind('-'));
    const char* signature = nullptr;
    for (unsigned i = 0; const char* name = describe(i, &signature); i++) {
      auto function = std::make_unique<Function>();
      function->name = name, function->file = file, function->signature = signature;
      function->index = i, function->launch = launch;
      functions.push_back(std::move(function));
    }
  }
}

size_t pages(size_t bytes) { return (bytes + PAGE_BYTES - 1) / PAGE_BYTES * PAGE_BYTES; }
size_t total_bytes() { return number("STUB_CUDA_MEMORY", size_t(2) << 30); }
size_t used_bytes() { return large_bytes + pages(small_bytes); }

// Bytes of the memory in which an address lies, from there on; none outside.
size_t room(const std::map<uint64_t, size_t>& memory, uint64_t address) {
  auto next = memory.upper_bound(address);
  if (next == memory.begin()) return 0;
  auto [start, bytes] = *std::prev(next);
  return address - start < bytes ? start + bytes - address : 0;
}

// Whether a kernel may be given a pointer: empty tensors point just behind memory.
bool is_device_pointer(uint64_t address) {
  return address == 0 || room(device_memory, address) > 0 || room(device_memory, address - 1) > 0;
}

bool is_wanted(const Wish& wish, const Function& function) {
  return wish.number != 0 && wish.name == function.name && wish.number == function.runs;
}

int run_kernel(Stream& stream, Work& work) {
  Function& function = *work.function;
  function.runs++;
  if (is_wanted(fault, function)) {
    note("fault %s\n", function.name.c_str());
    return ILLEGAL_ADDRESS;
  }
  if (is_wanted(hang, function)) {
    stream.hangs = true;
    return SUCCESS;
  }
  std::vector<void*> addresses;
  for (size_t i = 0; i < work.arguments.size(); i++) {
    if (function.signature[i] == 'p' && !is_device_pointer(work.arguments[i])) {
      std::fprintf(stderr, "stub libcuda: argument %zu of %s is not in device memory\n", i, function.name.c_str());
      return ILLEGAL_ADDRESS;
    }
    addresses.push_back(&work.arguments[i]);
  }
  const char* error = function.launch(function.index, work.sizes, work.shared_bytes, addresses.data(), seed++);
  if (!error) return SUCCESS;
  std::fprintf(stderr, "stub libcuda: %s\n", error);
  return LAUNCH_FAILED;
}

int run(Stream& stream, Work& work) {
  switch (work.kind) {
    case Work::LAUNCH:
      return run_kernel(stream, work);
    case Work::COPY:
      std::memmove(reinterpret_cast<void*>(work.to), reinterpret_cast<void*>(work.from), work.bytes);
      return SUCCESS;
    case Work::FILL:
      std::memset(reinterpret_cast<void*>(work.to), work.value, work.bytes);
      return SUCCESS;
    default:
      return SUCCESS;
  }
}

// Runs what was asked for up to the piece of work of this number.
int run_until(Stream& stream, uint64_t last) {
  while (sticky == SUCCESS && !stream.hangs && stream.done < last) {
    Work work = std::move(stream.queue.front());
    stream.queue.pop_front();
    stream.done++;
    sticky = run(stream, work);
  }
  return sticky;
}

int run_everything() {
  for (Stream* stream : streams) run_until(*stream, stream->added);
  return sticky;
}

// Who waits for a kernel that never ends, waits for ever, and nobody else does.
int wait_until(Stream& stream, uint64_t last, std::unique_lock<std::mutex>& lock) {
  run_until(stream, last);
  if (stream.hangs && stream.done <= last) {
    lock.unlock();
    for (;;) pause();
  }
  return sticky;
}

int add(Stream& stream, Work work) {
  if (stream.is_capturing) {
    stream.captured.push_back(std::move(work));
    return stream.is_invalid ? CAPTURE_INVALIDATED : SUCCESS;
  }
  stream.queue.push_back(std::move(work));
  stream.added++;
  return SUCCESS;
}

// What may not be called while this thread captures ends the capture.
int refuse_capture() {
  if (!capturing) return SUCCESS;
  capturing->is_invalid = true;
  return CAPTURE_UNSUPPORTED;
}

int check() {
  if (!is_started) return NOT_INITIALIZED;
  if (current != &the_context) return INVALID_CONTEXT;
  return sticky;
}

struct Named {
  int code;
  const char *name, *words;
};

const Named NAMES[] = {
    {SUCCESS, "CUDA_SUCCESS", "no error"},
    {INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {NOT_INITIALIZED, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {NO_DEVICE, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {NOT_FOUND, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {NOT_READY, "CUDA_ERROR_NOT_READY", "device not ready"},
    {ILLEGAL_ADDRESS, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {LAUNCH_FAILED, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
    {CAPTURE_UNSUPPORTED, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", "operation not permitted when stream is capturing"},
    {CAPTURE_INVALIDATED, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED", "operation failed due to a previous error during capture"},
    {CAPTURED_EVENT, "CUDA_ERROR_CAPTURED_EVENT", "operation not permitted on an event last recorded in a capturing stream"},
};

const Named* named(int code) {
  for (const Named& each : NAMES)
    if (each.code == code) return &each;
  return nullptr;
}

}  // namespace

#define ENTRY extern "C" __attribute__((visibility("default"))) int
#define LOCK std::unique_lock<std::mutex> lock(mutex)
// Whatever concerns a device.
#define BEGIN                         \
  LOCK;                               \
  if (int error = check()) return error

// ---- The driver and its devices ----------------------------------------------------------------

ENTRY cuGetErrorName(int code, const char** text) {
  const Named* found = named(code);
  *text = found ? found->name : nullptr;
  return found ? SUCCESS : INVALID_VALUE;
}

ENTRY cuGetErrorString(int code, const char** text) {
  const Named* found = named(code);
  *text = found ? found->words : nullptr;
  return found ? SUCCESS : INVALID_VALUE;
}

ENTRY cuDriverGetVersion(int* version) {
  *version = number("STUB_CUDA_VERSION", 13000);
  return SUCCESS;
}

ENTRY cuInit(unsigned) {
  LOCK;
  // As real drivers answer where there is none, or CUDA_VISIBLE_DEVICES hides all.
  if (number("STUB_CUDA_DEVICES", 1) == 0) return NO_DEVICE;
  if (is_started) return SUCCESS;
  is_started = true;
  fault = wish("STUB_CUDA_FAULT"), hang = wish("STUB_CUDA_HANG");
  if (const char* path = std::getenv("STUB_CUDA_TRACE")) trace = std::fopen(path, "a");
  load_kernels();
  return SUCCESS;
}

ENTRY cuDeviceGetCount(int* count) {
  if (!is_started) return NOT_INITIALIZED;
  *count = number("STUB_CUDA_DEVICES", 1);
  return SUCCESS;
}

ENTRY cuDeviceGet(int* device, int ordinal) {
  if (!is_started) return NOT_INITIALIZED;
  if (ordinal < 0 || size_t(ordinal) >= number("STUB_CUDA_DEVICES", 1)) return INVALID_DEVICE;
  *device = ordinal;
  return SUCCESS;
}

ENTRY cuDeviceGetName(char* name, int len, int) {
  std::snprintf(name, len, "Stub GPU");
  return SUCCESS;
}

ENTRY cuDeviceTotalMem_v2(size_t* bytes, int) {
  *bytes = total_bytes();
  return SUCCESS;
}

ENTRY cuDeviceGetAttribute(int* value, int attribute, int) {
  switch (attribute) {
    case 16: *value = 6; return SUCCESS;                    // MULTIPROCESSOR_COUNT
    case 75: *value = 9; return SUCCESS;                    // COMPUTE_CAPABILITY_MAJOR
    case 76: *value = 0; return SUCCESS;                    // COMPUTE_CAPABILITY_MINOR
    case 97: *value = SHARED_BYTES_OPTIN; return SUCCESS;   // MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
    default: return INVALID_VALUE;
  }
}

ENTRY cuDevicePrimaryCtxRetain(void** context, int) {
  if (!is_started) return NOT_INITIALIZED;
  *context = &the_context;
  return SUCCESS;
}

ENTRY cuDevicePrimaryCtxRelease_v2(int) { return SUCCESS; }

ENTRY cuCtxSetCurrent(void* context) {
  if (!is_started) return NOT_INITIALIZED;
  current = context;
  return SUCCESS;
}

// ---- Memory ------------------------------------------------------------------------------------

ENTRY cuMemGetInfo_v2(size_t* free_bytes, size_t* total) {
  BEGIN;
  *total = total_bytes();
  *free_bytes = *total - used_bytes();
  return SUCCESS;
}

ENTRY cuMemAlloc_v2(uint64_t* address, size_t bytes) {
  BEGIN;
  if (int error = refuse_capture()) return error;
  if (bytes == 0) return INVALID_VALUE;
  size_t& kind = bytes < SMALL_BYTES ? small_bytes : large_bytes;
  size_t before = kind;
  kind += bytes < SMALL_BYTES ? (bytes + ALIGN_BYTES - 1) / ALIGN_BYTES * ALIGN_BYTES : pages(bytes);
  if (used_bytes() + number("STUB_CUDA_HIDDEN", 0) > total_bytes()) {
    kind = before;
    return OUT_OF_MEMORY;
  }
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) std::abort();
  std::memset(memory, POISON, std::min(bytes, POISONED_BYTES));
  *address = reinterpret_cast<uint64_t>(memory);
  device_memory[*address] = bytes;
  note("alloc %zu\n", bytes);
  return SUCCESS;
}

ENTRY cuMemFree_v2(uint64_t address) {
  BEGIN;
  if (int error = refuse_capture()) return error;
  auto found = device_memory.find(address);
  if (found == device_memory.end()) return INVALID_VALUE;
  if (int error = run_everything()) return error;
  size_t bytes = found->second;
  (bytes < SMALL_BYTES ? small_bytes : large_bytes) -=
      bytes < SMALL_BYTES ? (bytes + ALIGN_BYTES - 1) / ALIGN_BYTES * ALIGN_BYTES : pages(bytes);
  device_memory.erase(found);
  munmap(reinterpret_cast<void*>(address), bytes);
  note("free %zu\n", bytes);
  return SUCCESS;
}

ENTRY cuMemHostAlloc(void** address, size_t bytes, unsigned) {
  BEGIN;
  if (int error = refuse_capture()) return error;
  *address = std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
  if (!*address) return OUT_OF_MEMORY;
  host_memory[reinterpret_cast<uint64_t>(*address)] = bytes;
  return SUCCESS;
}

ENTRY cuMemFreeHost(void* address) {
  BEGIN;
  if (!host_memory.erase(reinterpret_cast<uint64_t>(address))) return INVALID_VALUE;
  run_everything();
  std::free(address);
  return sticky;
}

static int fill(uint64_t to, unsigned char value, size_t bytes, Stream* stream) {
  if (bytes == 0) return SUCCESS;
  if (room(device_memory, to) < bytes) return INVALID_VALUE;
  Work work{Work::FILL};
  work.to = to, work.value = value, work.bytes = bytes;
  return add(*stream, std::move(work));
}

ENTRY cuMemsetD8Async(uint64_t to, unsigned char value, size_t bytes, Stream* stream) {
  BEGIN;
  return fill(to, value, bytes, stream);
}

static int copy(uint64_t to, uint64_t from, size_t bytes, Stream* stream) {
  Work work{Work::COPY};
  work.to = to, work.from = from, work.bytes = bytes;
  return bytes == 0 ? SUCCESS : add(*stream, std::move(work));
}

// Memory of the host that is not pinned would make a copy wait; nothing of ours is meant to.
ENTRY cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t bytes, Stream* stream) {
  BEGIN;
  uint64_t host = reinterpret_cast<uint64_t>(from);
  if (bytes && (room(device_memory, to) < bytes || room(host_memory, host) < bytes)) return INVALID_VALUE;
  return copy(to, host, bytes, stream);
}

ENTRY cuMemcpyDtoHAsync_v2(void* to, uint64_t from, size_t bytes, Stream* stream) {
  BEGIN;
  uint64_t host = reinterpret_cast<uint64_t>(to);
  if (bytes && (room(device_memory, from) < bytes || room(host_memory, host) < bytes)) return INVALID_VALUE;
  return copy(host, from, bytes, stream);
}

ENTRY cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, Stream* stream) {
  BEGIN;
  if (bytes && (room(device_memory, to) < bytes || room(device_memory, from) < bytes)) return INVALID_VALUE;
  return copy(to, from, bytes, stream);
}

// ---- Modules and kernels -----------------------------------------------------------------------

// An image that begins with "stub:NAME" has the kernels of that file, any other has all.
ENTRY cuModuleLoadData(Module** module, const void* image) {
  BEGIN;
  const char* text = static_cast<const char*>(image);
  bool is_stub = std::strncmp(text, "stub:", 5) == 0;
  *module = new Module{is_stub ? std::string(text + 5) : std::string()};
  return SUCCESS;
}

ENTRY cuModuleUnload(Module* module) {
  BEGIN;
  delete module;
  return SUCCESS;
}

ENTRY cuModuleGetFunction(Function** function, Module* module, const char* name) {
  BEGIN;
  for (auto& each : functions) {
    bool is_in = module->file.empty() || module->file == each->file;
    if (is_in && each->name == name) return *function = each.get(), SUCCESS;
  }
  return NOT_FOUND;
}

ENTRY cuFuncGetAttribute(int* value, int attribute, Function* function) {
  BEGIN;
  switch (attribute) {
    case 1: *value = 0; return SUCCESS;                       // SHARED_SIZE_BYTES
    case 8: *value = function->max_dynamic; return SUCCESS;   // MAX_DYNAMIC_SHARED_SIZE_BYTES
    default: return INVALID_VALUE;
  }
}

ENTRY cuFuncSetAttribute(Function* function, int attribute, int value) {
  BEGIN;
  if (attribute != 8 || value < 0 || value > SHARED_BYTES_OPTIN) return INVALID_VALUE;
  function->max_dynamic = value;
  return SUCCESS;
}

static size_t parameter_bytes(char letter) { return letter == 'p' || letter == 'l' ? 8 : 4; }

ENTRY cuFuncGetParamInfo(Function* function, size_t index, size_t* offset, size_t* bytes) {
  BEGIN;
  if (index >= function->signature.size()) return INVALID_VALUE;
  size_t end = 0;
  for (size_t i = 0; i <= index; i++) {
    *bytes = parameter_bytes(function->signature[i]);
    *offset = (end + *bytes - 1) / *bytes * *bytes;
    end = *offset + *bytes;
  }
  return SUCCESS;
}

static bool is_blocking() {
  const char* text = std::getenv("CUDA_LAUNCH_BLOCKING");
  return text && std::strcmp(text, "1") == 0;
}

ENTRY cuLaunchKernel(Function* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                     unsigned shared_bytes, Stream* stream, void** arguments, void**) {
  BEGIN;
  bool is_empty = !gx || !gy || !gz || !bx || !by || !bz;
  bool is_large = gy > 65535 || gz > 65535 || size_t(bx) * by * bz > 1024 || bz > 64;
  if (is_empty || is_large || shared_bytes > unsigned(function->max_dynamic)) return INVALID_VALUE;
  Work work{Work::LAUNCH};
  work.function = function, work.shared_bytes = shared_bytes;
  const unsigned sizes[6] = {gx, gy, gz, bx, by, bz};
  std::memcpy(work.sizes, sizes, sizeof sizes);
  for (size_t i = 0; i < function->signature.size(); i++) {
    uint64_t value = 0;
    std::memcpy(&value, arguments[i], parameter_bytes(function->signature[i]));
    work.arguments.push_back(value);
  }
  bool runs_now = is_blocking() && !stream->is_capturing;
  note("launch %s\n", function->name.c_str());
  int error = add(*stream, std::move(work));
  return error || !runs_now ? error : run_until(*stream, stream->added);
}

// ---- Streams, events and graphs ----------------------------------------------------------------

ENTRY cuStreamCreate(Stream** stream, unsigned) {
  BEGIN;
  streams.push_back(*stream = new Stream());
  return SUCCESS;
}

ENTRY cuStreamSynchronize(Stream* stream) {
  BEGIN;
  if (stream->is_capturing) return stream->is_invalid = true, CAPTURE_UNSUPPORTED;
  return wait_until(*stream, stream->added, lock);
}

ENTRY cuStreamDestroy_v2(Stream* stream) {
  BEGIN;
  run_until(*stream, stream->added);
  streams.erase(std::find(streams.begin(), streams.end(), stream));
  delete stream;
  return SUCCESS;
}

ENTRY cuEventCreate(Event** event, unsigned) {
  BEGIN;
  *event = new Event();
  return SUCCESS;
}

ENTRY cuEventRecord(Event* event, Stream* stream) {
  BEGIN;
  event->is_captured = stream->is_capturing;
  int error = add(*stream, Work{Work::MARK});
  event->stream = stream, event->waits_for = stream->added;
  return error;
}

ENTRY cuEventSynchronize(Event* event) {
  BEGIN;
  if (event->is_captured) return CAPTURED_EVENT;
  return event->stream ? wait_until(*event->stream, event->waits_for, lock) : int(SUCCESS);
}

// Time passes while somebody asks, so that who asks again and again sees the end.
ENTRY cuEventQuery(Event* event) {
  BEGIN;
  if (event->is_captured) return CAPTURED_EVENT;
  if (!event->stream) return SUCCESS;
  if (int error = run_until(*event->stream, event->waits_for)) return error;
  return event->stream->hangs ? NOT_READY : SUCCESS;
}

ENTRY cuEventDestroy_v2(Event* event) {
  BEGIN;
  delete event;
  return SUCCESS;
}

ENTRY cuStreamBeginCapture_v2(Stream* stream, int) {
  BEGIN;
  if (stream->is_capturing) return INVALID_VALUE;
  stream->is_capturing = true, stream->is_invalid = false;
  stream->captured.clear();
  capturing = stream;
  return SUCCESS;
}

ENTRY cuStreamEndCapture(Stream* stream, Graph** graph) {
  BEGIN;
  *graph = nullptr;
  if (!stream->is_capturing) return INVALID_VALUE;
  stream->is_capturing = false;
  capturing = nullptr;
  if (stream->is_invalid) return CAPTURE_INVALIDATED;
  *graph = new Graph{std::move(stream->captured)};
  stream->captured.clear();
  return SUCCESS;
}

ENTRY cuGraphInstantiateWithFlags(Graph** exec, Graph* graph, unsigned long long) {
  BEGIN;
  *exec = new Graph(*graph);
  note("graph %zu\n", graph->work.size());
  return SUCCESS;
}

ENTRY cuGraphDestroy(Graph* graph) {
  BEGIN;
  delete graph;
  return SUCCESS;
}

ENTRY cuGraphExecDestroy(Graph* exec) {
  BEGIN;
  delete exec;
  note("graph destroyed\n");
  return SUCCESS;
}

ENTRY cuGraphLaunch(Graph* exec, Stream* stream) {
  BEGIN;
  if (stream->is_capturing) return stream->is_invalid = true, CAPTURE_UNSUPPORTED;
  note("replay %zu\n", exec->work.size());
  for (const Work& work : exec->work) add(*stream, work);
  return is_blocking() ? run_until(*stream, stream->added) : int(SUCCESS);
}
