// Finds the OpenMP runtime that torch brought into the process and runs our ranges on its team; see parallel.h.
#include "parallel.h"

#include <dlfcn.h>
#include <link.h>
#include <string.h>

#include <algorithm>
#include <string>
#include <thread>
#include <vector>

namespace everett {
namespace {

struct OpenMp {
  void (*parallel)(void (*)(void*), void*, unsigned threads, unsigned flags) = nullptr;
  int (*thread_number)() = nullptr;
  int (*team_size)() = nullptr;
  std::string path;
};

int note_library(dl_phdr_info* info, size_t, void* found) {
  const char* path = info->dlpi_name;
  const char* name = path ? strrchr(path, '/') : nullptr;
  if (!name) return 0;
  for (const char* runtime : {"/libgomp", "/libiomp5", "/libomp"})
    if (strncmp(name, runtime, strlen(runtime)) == 0) static_cast<std::vector<std::string>*>(found)->push_back(path);
  return 0;
}

// libgomp's entry points; LLVM's and Intel's runtimes export the same names. torch's copy first, if there are several.
OpenMp find_openmp() {
  std::vector<std::string> found;
  dl_iterate_phdr(note_library, &found);
  std::stable_sort(found.begin(), found.end(), [](const std::string& a, const std::string& b) {
    return (a.find("torch") != std::string::npos) > (b.find("torch") != std::string::npos);
  });
  for (const std::string& path : found) {
    void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_NOLOAD);
    if (!handle) continue;
    OpenMp omp;
    omp.parallel = reinterpret_cast<decltype(omp.parallel)>(dlsym(handle, "GOMP_parallel"));
    omp.thread_number = reinterpret_cast<decltype(omp.thread_number)>(dlsym(handle, "omp_get_thread_num"));
    omp.team_size = reinterpret_cast<decltype(omp.team_size)>(dlsym(handle, "omp_get_num_threads"));
    omp.path = path;
    if (omp.parallel && omp.thread_number && omp.team_size) return omp;
  }
  return {};
}

const OpenMp& openmp() {
  static const OpenMp omp = find_openmp();
  return omp;
}

struct Work {
  int64_t n, grain;
  RangeFn fn;
  void* context;

  void part(int number, int of) const {
    const int64_t units = (n + grain - 1) / grain;
    const int64_t begin = units * number / of * grain, end = std::min(n, units * (number + 1) / of * grain);
    if (begin < end) fn(context, begin, end);
  }
};

void on_team(void* data) {
  static_cast<const Work*>(data)->part(openmp().thread_number(), openmp().team_size());
}

}  // namespace

void parallel_for(int64_t n, int64_t grain, int threads, RangeFn fn, void* context) {
  threads = static_cast<int>(std::min<int64_t>(threads, (n + grain - 1) / grain));
  if (threads <= 1) {
    if (n > 0) fn(context, 0, n);
    return;
  }
  Work work{n, grain, fn, context};
  if (openmp().parallel) {
    openmp().parallel(on_team, &work, static_cast<unsigned>(threads), 0);
    return;
  }
  std::vector<std::thread> team;
  for (int i = 1; i < threads; i++) team.emplace_back([&work, i, threads] { work.part(i, threads); });
  work.part(0, threads);
  for (auto& t : team) t.join();
}

const char* openmp_library() { return openmp().path.c_str(); }

}  // namespace everett
