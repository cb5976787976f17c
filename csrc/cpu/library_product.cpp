// at::native::cpublas::brgemm of torch, by the names it is exported under: those contain the argument types, so another
// signature is another name.
#include "cpu/library_product.h"

#include <atomic>
#include <cstdlib>
#include <exception>
#include <vector>

#include "cpu/isa.h"
#include "cpu/tile_product.h"

#if ANOMEM_X86_VARIANTS && defined(__linux__)
#define ANOMEM_LIBRARY_PRODUCTS 1
// (m, n, k, row strides of A, B and C, accumulate, A, B, C, whether B is in pairs)
extern "C" void anomem_brgemm_float(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool, const float*,
                                    const float*, float*, bool) __asm__("_ZN2at6native7cpublas6brgemmEllllllbPKfS3_Pfb")
    __attribute__((weak));
extern "C" void anomem_brgemm_bfloat16(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool, const void*,
                                       const void*, float*,
                                       bool) __asm__("_ZN2at6native7cpublas6brgemmEllllllbPKN3c108BFloat16ES5_Pfb")
    __attribute__((weak));
extern "C" void anomem_brgemm_release(bool) __asm__("_ZN2at6native7cpublas14brgemm_releaseEb") __attribute__((weak));
#else
#define ANOMEM_LIBRARY_PRODUCTS 0
#endif

namespace anomem::cpu {

#if ANOMEM_LIBRARY_PRODUCTS
namespace {

void set(float& to, float x) { to = x; }
void set(Bfloat16& to, float x) { to = to_bfloat16(x); }

// Two products of small whole numbers, the second added to the first, against the exact sums.
template <class F>
bool is_right() {
  constexpr int64_t m = 5, n = 32, k = 6, pair = sizeof(F) == 2 ? 2 : 1, a_stride = 8, c_stride = 40;
  std::vector<F> a(m * a_stride), b(k * n);
  std::vector<float> c(m * c_stride, -1.0f);
  const auto left = [](int64_t i, int64_t p) { return static_cast<float>((i * 3 + p * 5) % 7 - 3); };
  const auto right = [](int64_t p, int64_t j) { return static_cast<float>((p * 2 + j) % 5 - 2); };
  for (int64_t i = 0; i < m; ++i)
    for (int64_t p = 0; p < k; ++p) set(a[i * a_stride + p], left(i, p));
  for (int64_t p = 0; p < k; ++p)
    for (int64_t j = 0; j < n; ++j) set(b[(p / pair * n + j) * pair + p % pair], right(p, j));
  try {
    for (const bool accumulate : {false, true})
      library_product(m, n, k, a.data(), a_stride, b.data(), n, c.data(), c_stride, accumulate);
    anomem_brgemm_release(pair == 2);
  } catch (const std::exception&) {
    return false;  // built without them, or a processor that they do not serve
  }
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < c_stride; ++j) {
      float sum = j < n ? 0.0f : -1.0f;
      for (int64_t p = 0; j < n && p < k; ++p) sum += 2 * left(i, p) * right(p, j);
      if (c[i * c_stride + j] != sum) return false;
    }
  return true;
}

bool are_wanted() {
  const char* named = std::getenv("ANOMEM_CPU");
  return (named == nullptr || *named == '\0') && isa() >= Isa::kAvx512;
}

// torch.backends.mkldnn may have been switched off since: these products of pairs then raise.
bool still_runs_pairs() {
  const Bfloat16 a[2] = {}, b[64] = {};
  float c[32];
  try {
    library_product(1, 32, 2, a, 2, b, 32, c, 32, false);
  } catch (const std::exception&) {
    return false;
  }
  anomem_brgemm_release(true);
  return true;
}

}  // namespace

bool takes_library_products(Type type, int64_t queries, int64_t prototypes, int64_t features) {
  static const bool wanted = are_wanted();
  if (!wanted || type == Type::kFloat64 || prototypes < 32 || features < 16) return false;
  // Fewer queries of a large memory were measured with AMX alone.
  if (queries < 126 && (queries < 64 || prototypes < 512 || !multiplies_in_tiles())) return false;
  static const bool right = anomem_brgemm_release != nullptr && anomem_brgemm_float != nullptr && is_right<float>();
  if (type == Type::kFloat32 || isa() != Isa::kAvx512Bf16) return right;
  // Tried again where it failed: torch.backends.mkldnn may have been off.
  static std::atomic<bool> right_pairs{false};
  if (!right_pairs) right_pairs = right && anomem_brgemm_bfloat16 != nullptr && is_right<Bfloat16>();
  return right_pairs && still_runs_pairs();
}

bool multiplies_in_tiles() {
#if __GNUC__ >= 11
  static const bool has_tiles = __builtin_cpu_supports("amx-bf16");  // and the system keeps them
  return has_tiles && takes_library_products(Type::kBfloat16, 1024, 1024, 1024);
#else
  return false;
#endif
}

void library_product(int64_t m, int64_t n, int64_t k, const float* a, int64_t a_stride, const float* b,
                     int64_t b_stride, float* c, int64_t c_stride, bool accumulate) {
  anomem_brgemm_float(m, n, k, a_stride, b_stride, c_stride, accumulate, a, b, c, false);
}

void library_product(int64_t m, int64_t n, int64_t k, const Bfloat16* a, int64_t a_stride, const Bfloat16* b,
                     int64_t b_stride, float* c, int64_t c_stride, bool accumulate) {
  anomem_brgemm_bfloat16(m, n, k, a_stride, b_stride, c_stride, accumulate, a, b, c, true);
}

LibraryProducts::LibraryProducts(bool used, bool pairs)
    : used_(used), pairs_(pairs), tiles_(used && !pairs && splits_products()) {
  if (tiles_) take_tiles();
}

LibraryProducts::~LibraryProducts() {
  if (used_) anomem_brgemm_release(pairs_);
  if (tiles_) release_tiles();
}
#else
bool takes_library_products(Type, int64_t, int64_t, int64_t) { return false; }
bool multiplies_in_tiles() { return false; }
void library_product(int64_t, int64_t, int64_t, const float*, int64_t, const float*, int64_t, float*, int64_t, bool) {}
void library_product(int64_t, int64_t, int64_t, const Bfloat16*, int64_t, const Bfloat16*, int64_t, float*, int64_t,
                     bool) {}
LibraryProducts::LibraryProducts(bool used, bool pairs) : used_(used), pairs_(pairs), tiles_(false) {}
LibraryProducts::~LibraryProducts() = default;
#endif

}  // namespace anomem::cpu
