// A .tflite file in the C API of TensorFlow Lite (libtensorflowlite_c): one input, one output.
#pragma once
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "tensorflow/lite/c/c_api.h"

class Model {
 public:
  Model(const std::string& content, int threads)
      : content_(content), model_(TfLiteModelCreate(content_.data(), content_.size()), TfLiteModelDelete) {
    if (!model_) throw std::runtime_error("TensorFlow Lite refuses the model");
    std::unique_ptr<TfLiteInterpreterOptions, void (*)(TfLiteInterpreterOptions*)> options(
        TfLiteInterpreterOptionsCreate(), TfLiteInterpreterOptionsDelete);
    TfLiteInterpreterOptionsSetNumThreads(options.get(), threads);
    interpreter_.reset(TfLiteInterpreterCreate(model_.get(), options.get()));
    if (!interpreter_ || TfLiteInterpreterAllocateTensors(interpreter_.get()) != kTfLiteOk)
      throw std::runtime_error("TensorFlow Lite cannot prepare the model");
  }

  std::vector<char> run(const std::vector<char>& input) {
    TfLiteTensor* source = TfLiteInterpreterGetInputTensor(interpreter_.get(), 0);
    if (TfLiteTensorCopyFromBuffer(source, input.data(), input.size()) != kTfLiteOk)
      throw std::runtime_error("a sample does not fit the model's input");
    if (TfLiteInterpreterInvoke(interpreter_.get()) != kTfLiteOk) throw std::runtime_error("the model did not run");
    const TfLiteTensor* result = TfLiteInterpreterGetOutputTensor(interpreter_.get(), 0);
    std::vector<char> output(TfLiteTensorByteSize(result));
    TfLiteTensorCopyToBuffer(result, output.data(), output.size());
    return output;
  }

 private:
  std::string content_;  // the model reads from it
  std::unique_ptr<TfLiteModel, void (*)(TfLiteModel*)> model_;
  std::unique_ptr<TfLiteInterpreter, void (*)(TfLiteInterpreter*)> interpreter_{nullptr, TfLiteInterpreterDelete};
};
