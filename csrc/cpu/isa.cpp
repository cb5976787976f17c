#include "cpu/isa.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace anomem::cpu {
namespace {

bool runs(Isa isa) {
#if ANOMEM_X86_VARIANTS
  if (isa == Isa::avx512_bf16) return __builtin_cpu_supports("avx512bf16") && runs(Isa::avx512);
  if (isa == Isa::avx512)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && runs(Isa::avx2);
  if (isa == Isa::avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return isa == Isa::baseline;
}

Isa choose() {
  const char* wanted = std::getenv("ANOMEM_CPU");
  if (wanted == nullptr || *wanted == '\0') {
    if (runs(Isa::avx512_bf16)) return Isa::avx512_bf16;
    if (runs(Isa::avx512)) return Isa::avx512;
    return runs(Isa::avx2) ? Isa::avx2 : Isa::baseline;
  }
  const struct {
    const char* name;
    Isa isa;
  } known[] = {{"baseline", Isa::baseline}, {"avx2", Isa::avx2}, {"avx512", Isa::avx512},
               {"avx512_bf16", Isa::avx512_bf16}};
  for (const auto& candidate : known) {
    if (std::strcmp(wanted, candidate.name) != 0) continue;
    if (runs(candidate.isa)) return candidate.isa;
    throw std::runtime_error("ANOMEM_CPU=" + std::string(wanted) + ": this processor cannot run it");
  }
  throw std::runtime_error("ANOMEM_CPU: expected baseline, avx2, avx512 or avx512_bf16, received \"" + std::string(wanted) + "\"");
}

}  // namespace

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

}  // namespace anomem::cpu
