// An .onnx file in the C++ API of onnxruntime: one input, one output.
#pragma once
#include <onnxruntime_cxx_api.h>

#include <stdexcept>
#include <string>
#include <vector>

class Model {
 public:
  Model(const std::string& content, int threads) : env_(ORT_LOGGING_LEVEL_WARNING, "edgeprune") {
    env_.DisableTelemetryEvents();
    Ort::SessionOptions options;
    options.SetIntraOpNumThreads(threads);
    options.AddConfigEntry("session.x64quantprecision", "1");  // no saturation on x86
    session_ = Ort::Session(env_, content.data(), content.size(), options);
    Ort::AllocatorWithDefaultOptions allocator;
    input_ = session_.GetInputNameAllocated(0, allocator).get();
    output_ = session_.GetOutputNameAllocated(0, allocator).get();
    const auto info = session_.GetInputTypeInfo(0);
    type_ = info.GetTensorTypeAndShapeInfo().GetElementType();
    shape_ = info.GetTensorTypeAndShapeInfo().GetShape();
    for (int64_t& size : shape_) size = size < 1 ? 1 : size;  // a free batch size
  }

  std::vector<char> run(std::vector<char> input) {
    const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
    const Ort::Value source =
        Ort::Value::CreateTensor(memory, input.data(), input.size(), shape_.data(), shape_.size(), type_);
    const char *in = input_.c_str(), *out = output_.c_str();
    const auto results = session_.Run(Ort::RunOptions{}, &in, &source, 1, &out, 1);
    const auto found = results[0].GetTensorTypeAndShapeInfo();
    const size_t width = found.GetElementType() == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT ? sizeof(float) : 1;
    const char* data = (const char*)results[0].GetTensorRawData();
    return {data, data + found.GetElementCount() * width};
  }

 private:
  Ort::Env env_;
  Ort::Session session_{nullptr};
  std::string input_, output_;
  ONNXTensorElementDataType type_;
  std::vector<int64_t> shape_;
};
