// Run this bundle's model from C++17: checks the golden samples, prints PASS or FAIL, exit code 0 or 1. Build: see CMakeLists.txt.
//
// Tried on Linux x86-64 with g++ 12: the TensorFlow Lite C API 2.9.0, and the onnxruntime C++ API of 1.21 with the library of 1.32.
// Not compiled by edgeprune for ARM, Android or Windows. Check the files of the bundle first: sha256sum -c SHA256SUMS
#include <cmath>
#include <cstdio>
#include <exception>

#include "bundle.hpp"
#ifdef USE_ONNXRUNTIME
#include "runtime_onnx.hpp"
#else
#include "runtime_tflite.hpp"
#endif

// One raw sample (uint8 [H, W] or [H, W, C]; float as the torch model wanted it) as floats in the layout of the file.
static Floats preprocess(const Array& raw, size_t index, const Json& recipe) {
  std::vector<size_t> shape(raw.shape.begin() + 1, raw.shape.end());
  const bool image = raw.type == 'u';
  if (image && shape.size() == 2) shape.push_back(1);
  size_t count = 1;
  for (size_t size : shape) count *= size;
  Floats x(count);
  const Json &mean = recipe["preprocess"]["mean"], &std = recipe["preprocess"]["std"];
  for (size_t i = 0; i < count; ++i) {
    x[i] = raw.at(index * count + i);
    if (!image) continue;
    const size_t c = i % shape[2];  // [H, W, C]
    const auto constant = [c](const Json& list) { return float(list[list.size() == 1 ? 0 : c].number); };
    x[i] = (x[i] / 255.0f - constant(mean)) / constant(std);
  }
  const bool channels_last = recipe["input"]["layout"].text == "NHWC";
  if (shape.size() != 3 || image == channels_last) return x;
  Floats turned(count);  // images become [C, H, W]; the floats of a torch model, which are that, become [H, W, C]
  const size_t rows = image ? shape[0] * shape[1] : shape[0], columns = count / rows;
  for (size_t r = 0; r < rows; ++r)
    for (size_t c = 0; c < columns; ++c) turned[c * rows + r] = x[r * columns + c];
  return turned;
}

static int check(const std::string& root) {
  const Json recipe = parse_json(read_file(root + "/preprocess.json"));
  const Json rules = parse_json(read_file(root + "/golden/tolerance.json"));
  const Array raw = parse_npy(read_file(root + "/golden/inputs.npy"));
  const Array golden = parse_npy(read_file(root + "/golden/outputs.npy"));
  const auto labels = lines(read_file(root + "/labels.txt"));
  Model model(read_file(root + "/" + recipe["model"].text), int(recipe["runtime"]["threads"].number));
  const size_t samples = raw.shape.at(0), classes = golden.shape.at(1);
  if (labels.size() != classes || golden.shape[0] != samples) throw std::runtime_error("the files do not fit");
  double worst = 0, sum = 0, same = 0;
  for (size_t n = 0; n < samples; ++n) {
    const Floats y = tensor_floats(model.run(tensor_bytes(preprocess(raw, n, recipe), recipe["input"])), recipe["output"]);
    if (y.size() != classes) throw std::runtime_error("the model answers with another size");
    size_t best = 0, wanted = 0;
    for (size_t k = 0; k < classes; ++k) {
      const double error = std::fabs(double(y[k]) - golden.at(n * classes + k));
      if (!(error <= worst) && worst == worst) worst = error;  // NaN stays and fails below
      sum += error;
      if (y[k] > y[best]) best = k;
      if (golden.at(n * classes + k) > golden.at(n * classes + wanted)) wanted = k;
    }
    same += best == wanted;
    if (n == 0) std::printf("first sample: %s\n", labels[best].c_str());
  }
  const double limit = rules["max_abs_error"].number, scale = recipe["output"]["scale"].number;
  const bool ok = worst <= limit * 1.001 && same / samples >= rules["tolerance"]["min_argmax_agreement"].number;
  std::printf("%s, %zu samples, largest error %.3g (allowed %.3g), mean %.3g", ok ? "PASS" : "FAIL", samples, worst, limit,
              sum / double(samples * classes));
  if (scale > 0) std::printf(", in steps: %.3g and %.3g", worst / scale, sum / double(samples * classes) / scale);
  std::printf(", same class %.0f%%\n", 100 * same / samples);
  return ok ? 0 : 1;
}

int main(int argc, char** argv) {
  try {
    return check(argc > 1 ? argv[1] : "../..");
  } catch (const std::exception& error) {
    std::printf("FAIL: %s\n", error.what());
    return 1;
  }
}
