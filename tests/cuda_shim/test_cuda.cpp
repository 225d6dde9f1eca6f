// The CUDA kernels' own source, run on the CPU by the shim, against double precision. Arguments:
// nothing for the short set, "long" for every order of threads and every shape, or the words a
// case's name must hold.
#include "harness.h"

namespace {

using namespace harness;

int failures = 0, checks = 0;
bool verbose = false;

void expect(bool holds, const std::string& name, const std::string& what, double value) {
  ++checks;
  failures += !holds;
  if (!holds || verbose) {
    std::printf("%s %s: %s (%.3g)\n", holds ? "ok  " : "FAIL", name.c_str(), what.c_str(), value);
  }
}

// Units in the last place. float32 and float64: what summing in another order costs. Two-byte
// rows: the one rounding at the end, half a unit, and what the float32 sums before it add.
double row_limit(DType dtype) {
  return dtype == DType::kFloat ? 12 : (dtype == DType::kDouble ? 64 : 0.75);
}

void check_forward(const Case& c, const reference::Problem& p, const reference::Result& expected,
                   Run& run) {
  const DType acc = run.acc;
  const double sums = acc == DType::kDouble ? 64 : 24;
  const double off = error_of(run.out.values(), expected.out, c.D, digits_of(c.dtype));
  expect(off <= row_limit(c.dtype), c.name, "out", off);
  expect(run.out.gaps_untouched(), c.name, "nothing is written between the rows", 0);
  if (!c.final) return;
  const double kv = error_of(run.final_kv.values(), expected.kv, c.D * c.D, digits_of(acc));
  expect(kv <= sums, c.name, "final kv", kv);
  const double k_sum = error_of(run.final_k_sum.values(), expected.k_sum, c.D, digits_of(acc));
  expect(k_sum <= sums, c.name, "final k_sum", k_sum);
  const double conv = error_of(run.final_conv.values(), expected.conv, 1, digits_of(acc));
  expect(conv == 0, c.name, "final conv", conv);
  (void)p;
}

// The scale of gradients is the largest of the whole tensor: R^T (S dnum) and dden z cancel, at a
// sequence's first item to nothing.
void check_backward(const Case& c, const reference::Problem& p, Run& run) {
  Random random(5);
  const int64_t C = p.H * p.D;
  const Values dy = random.values(p.items * C, c.dtype);
  reference::Result dfinal;
  if (c.grad_final) {
    dfinal = {{},
              random.values(p.B * C * p.D, run.acc),
              random.values(p.B * C, run.acc),
              random.values(p.B * (p.W - 1) * C, run.acc)};
  }
  const reference::Gradients expected = reference::backward(p, dy, dfinal);
  const int error = run.backward(dy, dfinal);
  expect(error == 0, c.name, "launch backward", error);
  const double limit = c.dtype == DType::kFloat    ? 40
                       : c.dtype == DType::kDouble ? 200
                                                   : 0.75;
  const auto rows = [&](const char* what, RowBuffer& got, const Values& wanted) {
    const double off = error_of(got.values(), wanted, int64_t(wanted.size()), digits_of(c.dtype));
    expect(off <= limit, c.name, what, off);
    expect(got.gaps_untouched(), c.name, "nothing is written between the rows", 0);
  };
  rows("dq", run.dq, expected.q);
  rows("dk", run.dk, expected.k);
  rows("dv", run.dv, expected.v);
  if (c.gate) rows("dgate", run.dgate, expected.gate);
  const int digits = digits_of(run.acc);
  const auto dense = [&](const char* what, const Dense& got, const Values& wanted, int64_t width) {
    const double off = error_of(got.values(), wanted, width, digits);
    expect(off <= (run.acc == DType::kDouble ? 200 : 40), c.name, what, off);
  };
  if (c.conv) dense("dweight", run.dweight, expected.weight, C * p.W);
  if (c.conv && c.bias) dense("dbias", run.dbias, expected.bias, C);
  if (!c.initial) return;
  dense("dkv", run.dkv, expected.kv, p.D * p.D);
  dense("dk_sum", run.dk_sum, expected.k_sum, p.D);
  if (p.W > 1) dense("dconv", run.dconv, expected.conv, C);
}

void run_case(const Case& c, unsigned seed) {
  const reference::Problem p = random_problem(c, seed);
  Run run(c, p);
  const int error = run.forward(true);
  expect(error == 0, c.name, "launch", error);
  check_forward(c, p, reference::forward(p), run);
  check_backward(c, p, run);
}

std::string text_of(const Case& c) {
  std::string text = std::string(name_of(c.dtype)) + " H" + std::to_string(c.H) + " D" +
                     std::to_string(c.D) + " W" + std::to_string(c.conv ? c.W : 0) +
                     (c.layout == Layout::kWhole    ? " whole"
                      : c.layout == Layout::kPadded ? " padded"
                                                    : " packed");
  for (int64_t n : c.lengths) text += " " + std::to_string(n);
  if (!c.gate) text += " no-gate";
  if (!c.bias) text += " no-bias";
  if (c.initial) text += " initial@" + std::to_string(c.position);
  if (c.final) text += " final";
  if (c.grad_final) text += " grad-final";
  if (c.gap) text += " gap" + std::to_string(c.gap);
  return text;
}

std::vector<Case> cases(bool all) {
  std::vector<Case> list;
  const auto add = [&](Case c) {
    c.name = text_of(c);
    list.push_back(c);
  };
  for (int64_t D : {2, 6, 8, 16, 32, 64, 128}) {
    for (DType dtype : {DType::kFloat, DType::kBFloat16, DType::kHalf, DType::kDouble}) {
      Case c;
      c.dtype = dtype;
      c.D = D;
      c.H = D >= 64 ? 1 : 3;  // 3: a warp's units belong to several sequences
      c.lengths = {5, 0, 9};
      c.layout = Layout::kPadded;
      c.final = c.initial = c.grad_final = D % 16 == 0;
      c.position = 1000003;
      if (all || dtype == DType::kFloat || D == 6 || D == 16) add(c);
    }
  }
  for (int64_t L : {1, 2, 63, 64, 65, 130}) {
    for (int64_t D : {8, 16, 32, 64}) {
      Case c;
      c.D = D;
      c.H = 1;
      c.lengths = {L};
      c.final = true;
      if (all || L == 65 || (L == 130 && D == 16)) add(c);
    }
  }
  for (int64_t W : {1, 2, 4, 7}) {
    for (int64_t D : {6, 16, 32}) {
      Case c;
      c.D = D;
      c.W = W;
      c.layout = Layout::kPacked;
      c.lengths = {4, 0, 0, 11, 1, 67};
      c.final = c.initial = c.grad_final = true;
      c.bias = W != 2;
      if (all || (D != 32 && W != 2)) add(c);
    }
  }
  for (int64_t gap : {0, 1, 8}) {
    Case c;
    c.gap = gap;
    c.gate = gap != 0;
    c.conv = gap == 1;
    c.lengths = {13, 13};
    add(c);
    c.dtype = DType::kBFloat16;
    c.D = 32;
    if (all) add(c);
  }
  for (int64_t D : {8, 16, 64, 10}) {  // the base and, but for D 10, segments of a sequence
    Case c;
    c.D = D;
    c.H = 1;
    c.layout = Layout::kPacked;
    c.lengths = {3, 600};
    c.final = c.initial = c.grad_final = true;
    if (all || D == 16) add(c);
  }
  return list;
}

}  // namespace

int main(int argc, char** argv) {
  const bool all = argc > 1 && std::string(argv[1]) == "long";
  const std::string only = argc > 1 && !all ? argv[1] : "";
  verbose = !only.empty();
  const unsigned seeds = all ? 8 : 1;
  for (unsigned order = 0; order < 2 + seeds; ++order) {
    shim::set_order(order == 0   ? shim::Order::kForward
                    : order == 1 ? shim::Order::kReverse
                                 : shim::Order::kShuffled,
                    order);
    for (const Case& c : cases(all && order < 3)) {
      if (c.name.find(only) != std::string::npos) run_case(c, 1);
    }
  }
  std::printf("%d checks, %d failures\n", checks, failures);
  return failures == 0 ? 0 : 1;
}
