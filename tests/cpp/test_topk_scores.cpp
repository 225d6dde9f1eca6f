// The torch-free kernel of topk_scores against sorting, over sizes that fill blocks and panels or
// not, with lists of seen items that end below and above every item. Under the sanitizers a read
// past an array fails. Runs the level named by RECGRELA_CPU_LEVEL; 77 where the machine lacks it.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "cpu/kernels.h"
#include "level.h"

using namespace recgrela;

namespace {

bool agrees(int64_t users, int64_t items, int64_t width, int64_t k, int64_t seen) {
  std::mt19937 generator(1);
  std::uniform_int_distribution<int> small(-2, 2);
  std::uniform_int_distribution<int64_t> row(0, items - 1);
  std::vector<float> hidden(users * width), table(items * width);
  for (float& x : hidden) x = float(small(generator));
  for (float& x : table) x = float(small(generator));
  std::vector<int64_t> lists(users * seen);
  for (int64_t& x : lists) x = row(generator);
  for (int64_t u = 0; u < users; ++u) {
    std::sort(lists.begin() + u * seen, lists.begin() + (u + 1) * seen);
  }
  std::vector<float> scores(users * k, -INFINITY);
  std::vector<int64_t> found(users * k, 0);
  TopKParams p{};
  p.table_type = DType::kFloat;
  p.users = users;
  p.width = width;
  p.k = k;
  p.parts = 1;
  p.hidden = hidden.data();
  p.table = table.data();
  p.table_stride = width;
  p.num_items = items;
  p.seen = seen ? lists.data() : nullptr;
  p.num_seen = seen;
  p.scores = scores.data();
  p.items = found.data();
  kernels().topk_scores(p, 0, (users + kGroupUsers - 1) / kGroupUsers);
  for (int64_t u = 0; u < users; ++u) {
    std::vector<std::pair<float, int64_t>> want, got;
    const auto begin = lists.begin() + u * seen, end = begin + seen;
    for (int64_t i = 1; i < items; ++i) {  // row 0 is padding
      float score = 0;
      for (int64_t c = 0; c < width; ++c) score += hidden[u * width + c] * table[i * width + c];
      if (!std::binary_search(begin, end, i)) want.push_back({-score, i});
    }
    std::sort(want.begin(), want.end());
    want.resize(std::min<std::size_t>(want.size(), k));
    for (int64_t i = 0; i < k; ++i) {
      if (scores[u * k + i] > -INFINITY) got.push_back({-scores[u * k + i], found[u * k + i]});
    }
    std::sort(got.begin(), got.end());
    if (got != want) return false;
  }
  return true;
}

}  // namespace

int main() {
  if (!has_level()) return kSkipped;
  int failures = 0;
  for (int64_t users : {1, 3, 8, 33, 600}) {
    for (int64_t items : {1, 5, 240, 500}) {
      for (int64_t seen : {0, 1, 40}) {
        const bool good = agrees(users, items, users == 33 ? 7 : 16 + users % 7, 9, seen);
        if (!good) std::printf("FAIL %d users, %d items\n", int(users), int(items));
        failures += !good;
      }
    }
  }
  std::printf("%d failures\n", failures);
  return failures != 0;
}
