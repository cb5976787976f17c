// Which instruction sets the processor runs, and the choice among them.
#include "cpu/isa.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace anomem::cpu {
namespace {

bool runs(Isa isa) {
#if ANOMEM_X86_VARIANTS
  if (isa == Isa::kAvx512Bf16)  // no processor has the first without the second
    return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni") && runs(Isa::kAvx512);
  if (isa == Isa::kAvx512)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && runs(Isa::kAvx2);
  if (isa == Isa::kAvx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return isa == Isa::kBaseline;
}

Isa choose() {
  const char* wanted = std::getenv("ANOMEM_CPU");
  if (wanted == nullptr || *wanted == '\0') {
    if (runs(Isa::kAvx512Bf16)) return Isa::kAvx512Bf16;
    if (runs(Isa::kAvx512)) return Isa::kAvx512;
    return runs(Isa::kAvx2) ? Isa::kAvx2 : Isa::kBaseline;
  }
  const struct {
    const char* name;
    Isa isa;
  } known[] = {
      {"baseline", Isa::kBaseline}, {"avx2", Isa::kAvx2}, {"avx512", Isa::kAvx512}, {"avx512_bf16", Isa::kAvx512Bf16}};
  for (const auto& candidate : known) {
    if (std::strcmp(wanted, candidate.name) != 0) continue;
    if (runs(candidate.isa)) return candidate.isa;
    throw std::runtime_error("ANOMEM_CPU=" + std::string(wanted) + ": this processor cannot run it");
  }
  throw std::runtime_error("ANOMEM_CPU: expected baseline, avx2, avx512 or avx512_bf16, received \"" +
                           std::string(wanted) + "\"");
}

}  // namespace

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

}  // namespace anomem::cpu
