// The files of a bundle that a C++ program reads: JSON, .npy and lines, with no library.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

inline std::string read_file(const std::string& path) {
  std::ifstream stream(path, std::ios::binary);
  if (!stream) throw std::runtime_error("cannot read " + path);
  return {std::istreambuf_iterator<char>(stream), std::istreambuf_iterator<char>()};
}

inline std::vector<std::string> lines(const std::string& content) {
  std::vector<std::string> found;
  for (size_t at = 0; at < content.size();) {
    const size_t end = content.find('\n', at) == std::string::npos ? content.size() : content.find('\n', at);
    found.push_back(content.substr(at, end - at));
    at = end + 1;
  }
  return found;
}

using Floats = std::vector<float>;

// A value: absent ones read as 0 and "".
struct Json {
  double number = 0;
  std::string text;
  std::vector<Json> items;
  std::map<std::string, Json> fields;
  size_t size() const { return items.size(); }
  const Json& operator[](size_t index) const { return items.at(index); }
  const Json& operator[](const char* key) const {
    static const Json none;
    const auto found = fields.find(key);
    return found == fields.end() ? none : found->second;
  }
};

class JsonReader {
 public:
  explicit JsonReader(const std::string& content) : text_(content) {}
  Json value(int depth = 0) {
    if (depth > 32) throw std::runtime_error("JSON nests too deep");
    Json found;
    const char first = next();
    if (first == '{' || first == '[') {
      const char last = first == '{' ? '}' : ']';
      ++at_;
      while (next() != last) {
        if (first == '{') {
          const std::string key = string();
          expect(':');
          found.fields[key] = value(depth + 1);
        } else {
          found.items.push_back(value(depth + 1));
        }
        if (next() == ',') ++at_;
      }
      ++at_;
    } else if (first == '"') {
      found.text = string();
    } else {
      const size_t end = text_.find_first_of(",]} \n\r\t", at_);
      found.number = std::strtod(text_.substr(at_, end - at_).c_str(), nullptr);  // true, false and null read as 0
      at_ = end == std::string::npos ? text_.size() : end;
    }
    return found;
  }

 private:
  char next() {
    at_ = text_.find_first_not_of(" \n\r\t", at_);
    if (at_ == std::string::npos) throw std::runtime_error("JSON ends too early");
    return text_[at_];
  }
  void expect(char wanted) {
    if (next() != wanted) throw std::runtime_error("JSON is not sound");
    ++at_;
  }
  std::string string() {
    expect('"');
    std::string found;
    for (; at_ < text_.size() && text_[at_] != '"'; ++at_) {
      if (text_[at_] == '\\') ++at_;  // edgeprune writes text as it is: only \" and \\ matter to this program
      if (at_ < text_.size()) found += text_[at_];
    }
    expect('"');
    return found;
  }
  const std::string& text_;
  size_t at_ = 0;
};

inline Json parse_json(const std::string& content) { return JsonReader(content).value(); }

// An array of bytes or 32-bit floats, row by row.
struct Array {
  char type = 0;  // 'u' for uint8, 'f' for float32
  std::vector<size_t> shape;
  std::string data;
  float at(size_t index) const {
    if (type == 'u') return float((unsigned char)data.at(index));
    float value;
    if ((index + 1) * sizeof value > data.size()) throw std::runtime_error("an array is too short");
    std::memcpy(&value, data.data() + index * sizeof value, sizeof value);
    return value;
  }
};

// Format: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html
inline Array parse_npy(const std::string& content) {
  if (content.size() < 12 || content.compare(0, 6, "\x93NUMPY") != 0) throw std::runtime_error("not a .npy file");
  const bool is_first = content[6] == 1;
  uint32_t length = 0;
  for (int i = is_first ? 1 : 3; i >= 0; --i) length = length << 8 | (unsigned char)content[8 + i];
  const size_t start = (is_first ? 10 : 12) + size_t(length);
  if (start > content.size()) throw std::runtime_error("a .npy file is cut short");
  const std::string header = content.substr(is_first ? 10 : 12, length);
  Array found;
  if (header.find("'|u1'") != std::string::npos) found.type = 'u';
  if (header.find("'<f4'") != std::string::npos) found.type = 'f';
  if (!found.type || header.find("'fortran_order': False") == std::string::npos)
    throw std::runtime_error("a .npy file must hold uint8 or float32, row by row");
  const size_t open = header.find('('), close = header.find(')', open);
  if (close == std::string::npos) throw std::runtime_error("a .npy file has no shape");
  size_t count = found.type == 'f' ? 4 : 1;
  for (size_t at = open + 1; at < close;) {
    found.shape.push_back(std::strtoull(header.c_str() + at, nullptr, 10));
    count *= found.shape.back();
    at = header.find(',', at);
    at = at == std::string::npos || at > close ? close : at + 1;
    while (at < close && header[at] == ' ') ++at;
  }
  found.data = content.substr(start);
  if (found.shape.empty() || found.data.size() != count) throw std::runtime_error("a .npy file is cut short");
  return found;
}

// Floats as the bytes of a tensor: nearest step and clipped where the file wants 8-bit integers.
inline std::vector<char> tensor_bytes(const Floats& x, const Json& spec) {
  const std::string& type = spec["dtype"].text;
  if (type == "float32") return {(const char*)x.data(), (const char*)(x.data() + x.size())};
  if (type != "int8" && type != "uint8") throw std::runtime_error("input type " + type + " is not handled");
  const float low = type == "int8" ? -128.0f : 0.0f, scale = float(spec["scale"].number);
  std::vector<char> bytes(x.size());
  for (size_t i = 0; i < x.size(); ++i) {
    const float step = std::nearbyint(x[i] / scale) + float(spec["zero_point"].number);
    bytes[i] = char(int(std::min(std::max(step, low), low + 255.0f)));
  }
  return bytes;
}

inline Floats tensor_floats(const std::vector<char>& bytes, const Json& spec) {
  const std::string& type = spec["dtype"].text;
  if (type == "float32") return {(const float*)bytes.data(), (const float*)(bytes.data() + bytes.size())};
  Floats y(bytes.size());
  for (size_t i = 0; i < y.size(); ++i) {
    const int step = type == "int8" ? int((signed char)bytes[i]) : int((unsigned char)bytes[i]);
    y[i] = float(step - spec["zero_point"].number) * float(spec["scale"].number);
  }
  return y;
}
