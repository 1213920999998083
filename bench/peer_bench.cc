// llama.cpp under the stopwatch: a process that keeps one model loaded and times what it is told.
//
//     peer_bench quantize IN.gguf OUT.gguf q4_0|tq2_0
//     peer_bench serve MODEL.gguf THREADS       then one command per line on standard input:
//         context TOKENS FLASH    a fresh f16 cache for TOKENS tokens, flash attention 0 or 1
//         depth TOKENS BASE       TOKENS tokens in the cache; behind the first BASE they are copies
//         prefill N               N random tokens in batches of 2048 / 512; then forgotten
//         decode N                N single tokens, one by one; then forgotten
//         memory                  resident bytes now and at most;  `forget` starts the peak anew
//         quit
//
// Every command answers with one line of JSON: wall seconds, and processor seconds of all threads,
// which a busy machine disturbs less. The timed region holds llama_decode and
// llama_synchronize and nothing else: no sampling, no Python, no copying of logits.
//
// A depth of 128K tokens would take hours to reach by prefill, and the time of a dense step does
// not depend on what the cache holds. So a prefix is computed once, its state is read through the
// public llama_state_seq_get_data, its cells are repeated, and the longer state is written back.
// `depth N N` is a real prefill: the driver compares both at 4K and 16K.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <fstream>
#include <iostream>
#include <map>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "llama.h"

namespace {

constexpr int32_t BATCH = 2048, UBATCH = 512;  // llama.cpp's own defaults

using Clock = std::chrono::steady_clock;
double since(Clock::time_point begun) {
  return std::chrono::duration<double>(Clock::now() - begun).count();
}

double cpu_now() {
  timespec time;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

struct FreeModel { void operator()(llama_model* it) const { llama_model_free(it); } };
struct FreeContext { void operator()(llama_context* it) const { llama_free(it); } };

// A saved sequence, as llama.cpp writes it: a header, one record per cell, then per layer all keys,
// then per layer all values, cell by cell or (flash attention off) element by element.
class State {
 public:
  explicit State(std::vector<uint8_t> bytes) : in_(std::move(bytes)) {}

  std::vector<uint8_t> repeated(uint32_t depth) {
    copy<uint32_t>();  // magic
    copy<uint32_t>();  // sequence
    if (copy<uint32_t>() != 1) throw std::runtime_error("a state of one stream is expected");
    cells_ = read<uint32_t>();
    depth_ = depth;
    write(depth);
    for (uint32_t i = 0; i < cells_; ++i) {
      read<int32_t>();  // position
      if (read<uint32_t>() != 1) throw std::runtime_error("cells of one sequence are expected");
      read<int32_t>();  // its id
    }
    for (uint32_t i = 0; i < depth; ++i) {
      write<int32_t>(static_cast<int32_t>(i));
      write<uint32_t>(1);
      write<int32_t>(0);
    }
    const bool transposed = copy<uint32_t>() != 0;
    const uint32_t layers = copy<uint32_t>();
    for (uint32_t i = 0; i < layers; ++i) rows();
    for (uint32_t i = 0; i < layers; ++i) transposed ? elements() : rows();
    if (at_ != in_.size()) throw std::runtime_error("a state of another layout");
    return std::move(out_);
  }

 private:
  template <class T>
  T read() {
    T value;
    if (at_ + sizeof value > in_.size()) throw std::runtime_error("a state that ends early");
    std::memcpy(&value, in_.data() + at_, sizeof value);
    at_ += sizeof value;
    return value;
  }
  template <class T>
  void write(T value) {
    const auto* bytes = reinterpret_cast<const uint8_t*>(&value);
    out_.insert(out_.end(), bytes, bytes + sizeof value);
  }
  template <class T>
  T copy() {
    const T value = read<T>();
    write(value);
    return value;
  }
  void rows() {
    copy<int32_t>();  // type
    tile(copy<uint64_t>());
  }
  void elements() {
    copy<int32_t>();
    const uint32_t size = copy<uint32_t>(), width = copy<uint32_t>();
    for (uint32_t i = 0; i < width; ++i) tile(size);
  }
  void tile(size_t size) {
    if (at_ + size * cells_ > in_.size()) throw std::runtime_error("a state that ends early");
    const size_t begin = out_.size();
    out_.resize(begin + size * depth_);
    for (uint32_t i = 0; i < depth_; i += cells_) {
      const size_t count = std::min(cells_, depth_ - i);
      std::memcpy(out_.data() + begin + i * size, in_.data() + at_, count * size);
    }
    at_ += size * cells_;
  }

  std::vector<uint8_t> in_, out_;
  size_t at_ = 0;
  uint32_t cells_ = 0, depth_ = 0;
};

class Server {
 public:
  Server(const char* path, int threads) : threads_(threads) {
    llama_model_params params = llama_model_default_params();
    params.n_gpu_layers = 0;
    model_.reset(llama_model_load_from_file(path, params));
    if (!model_) throw std::runtime_error(std::string("cannot load ") + path);
    vocab_ = llama_vocab_n_tokens(llama_model_get_vocab(model_.get()));
  }

  std::string context(uint32_t tokens, int flash) {
    context_.reset();
    prefixes_.clear();
    depth_ = 0;
    llama_context_params params = llama_context_default_params();
    params.n_ctx = tokens;
    params.n_batch = BATCH;
    params.n_ubatch = UBATCH;
    params.n_threads = params.n_threads_batch = threads_;
    params.flash_attn_type = flash ? LLAMA_FLASH_ATTN_TYPE_ENABLED : LLAMA_FLASH_ATTN_TYPE_DISABLED;
    params.type_k = params.type_v = GGML_TYPE_F16;
    params.no_perf = true;
    context_.reset(llama_init_from_model(model_.get(), params));
    if (!context_) throw std::runtime_error("cannot make a context of that size");
    step(1, 1);  // the first call builds the graph
    forget(0);
    return number("context", llama_n_ctx(context_.get()));
  }

  std::string depth(uint32_t tokens, uint32_t base) {
    need();
    const auto begun = Clock::now();
    base = std::min(base, tokens);
    std::vector<uint8_t>& prefix = prefixes_[base];
    llama_memory_clear(llama_get_memory(context_.get()), false);
    if (prefix.empty() && base > 0) {
      step(base, BATCH);
      prefix.resize(llama_state_seq_get_size(context_.get(), 0));
      prefix.resize(llama_state_seq_get_data(context_.get(), prefix.data(), prefix.size(), 0));
      llama_memory_clear(llama_get_memory(context_.get()), false);
    }
    if (tokens > 0) {
      const std::vector<uint8_t> state = State(prefix).repeated(tokens);
      if (llama_state_seq_set_data(context_.get(), state.data(), state.size(), 0) == 0)
        throw std::runtime_error("the repeated state was refused");
      if (llama_memory_seq_pos_max(llama_get_memory(context_.get()), 0) + 1 !=
          static_cast<llama_pos>(tokens))
        throw std::runtime_error("the repeated state ends elsewhere");
    }
    depth_ = tokens;
    return number("depth", tokens) + number("seconds", since(begun));
  }

  std::string prefill(int32_t tokens) {
    need();
    const double cpu = cpu_now();
    const auto begun = Clock::now();
    step(tokens, BATCH);
    const double seconds = since(begun), spent = cpu_now() - cpu;
    check();
    forget(depth_);
    return number("tokens", tokens) + number("seconds", seconds) + number("cpu", spent);
  }

  std::string decode(int32_t tokens) {
    need();
    std::string each;
    double total = 0;
    const double cpu = cpu_now();
    for (int32_t i = 0; i < tokens; ++i) {
      const auto begun = Clock::now();
      step(1, 1);
      const double seconds = since(begun);
      total += seconds;
      each += (i ? "," : "") + std::to_string(seconds);
    }
    const double spent = cpu_now() - cpu;
    check();
    forget(depth_);
    return number("tokens", tokens) + number("seconds", total) + number("cpu", spent) +
           ",\"each\":[" + each + "]";
  }

  static std::string number(const char* name, double value) {
    char text[64];
    std::snprintf(text, sizeof text, ",\"%s\":%.9g", name, value);
    return text;
  }

 private:
  void need() const {
    if (!context_) throw std::runtime_error("`context` comes first");
  }
  void step(int32_t tokens, int32_t batch) {
    std::vector<llama_token> ids(static_cast<size_t>(std::min(tokens, batch)));
    for (int32_t done = 0; done < tokens; done += batch) {
      const int32_t count = std::min(batch, tokens - done);
      for (int32_t i = 0; i < count; ++i) ids[static_cast<size_t>(i)] = random_token();
      if (llama_decode(context_.get(), llama_batch_get_one(ids.data(), count)) != 0)
        throw std::runtime_error("llama_decode failed");
    }
    llama_synchronize(context_.get());
  }
  // Not-a-number would mean that the random weights are no model, and can be slow to add.
  void check() const {
    const float* logits = llama_get_logits_ith(context_.get(), -1);
    for (int i = 0; i < vocab_; ++i)
      if (!std::isfinite(logits[i])) throw std::runtime_error("logits that are not finite");
  }
  void forget(uint32_t from) {
    llama_memory_seq_rm(llama_get_memory(context_.get()), 0, static_cast<llama_pos>(from), -1);
  }
  llama_token random_token() {
    seed_ = seed_ * 6364136223846793005ull + 1442695040888963407ull;
    return 3 + static_cast<llama_token>((seed_ >> 33) % static_cast<uint64_t>(vocab_ - 3));
  }

  std::unique_ptr<llama_model, FreeModel> model_;
  std::unique_ptr<llama_context, FreeContext> context_;
  std::map<uint32_t, std::vector<uint8_t>> prefixes_;  // computed states, by length
  uint32_t depth_ = 0;
  int threads_, vocab_ = 0;
  uint64_t seed_ = 1;
};

std::string memory() {
  std::ifstream status("/proc/self/status");
  std::string line, answer;
  while (std::getline(status, line)) {
    if (line.rfind("VmHWM:", 0) == 0)
      answer += Server::number("peak_bytes", 1024 * std::atof(line.c_str() + 6));
    if (line.rfind("VmRSS:", 0) == 0)
      answer += Server::number("resident_bytes", 1024 * std::atof(line.c_str() + 6));
  }
  return answer;
}

std::string forget_peak() {
  std::ofstream("/proc/self/clear_refs") << 5;
  return memory();
}

int serve(const char* path, int threads) {
  Server server(path, threads);
  std::printf("{\"ready\":true,\"system\":\"%s\"}\n", llama_print_system_info());
  std::fflush(stdout);
  for (std::string line; std::getline(std::cin, line);) {
    std::istringstream words(line);
    std::string verb;
    long first = 0, second = 0;
    words >> verb >> first >> second;
    std::string answer;
    try {
      if (verb == "quit") return 0;
      if (verb == "context") answer = server.context(static_cast<uint32_t>(first), second != 0);
      else if (verb == "depth")
        answer = server.depth(static_cast<uint32_t>(first), static_cast<uint32_t>(second));
      else if (verb == "prefill") answer = server.prefill(static_cast<int32_t>(first));
      else if (verb == "decode") answer = server.decode(static_cast<int32_t>(first));
      else if (verb == "memory") answer = memory();
      else if (verb == "forget") answer = forget_peak();
      else throw std::runtime_error("unknown command");
      std::printf("{\"did\":\"%s\"%s}\n", verb.c_str(), answer.c_str());
    } catch (const std::exception& error) {
      std::printf("{\"error\":\"%s: %s\"}\n", verb.c_str(), error.what());
    }
    std::fflush(stdout);
  }
  return 0;
}

int quantize(const char* in, const char* out, const std::string& type) {
  llama_model_quantize_params params = llama_model_quantize_default_params();
  params.nthread = 1;
  if (type == "q4_0") params.ftype = LLAMA_FTYPE_MOSTLY_Q4_0;
  else if (type == "tq2_0") params.ftype = LLAMA_FTYPE_MOSTLY_TQ2_0;
  else throw std::runtime_error("only q4_0 and tq2_0");
  return static_cast<int>(llama_model_quantize(in, out, &params));
}

}  // namespace

int main(int count, char** words) {
  llama_log_set(
      [](ggml_log_level level, const char* text, void*) {
        if (level == GGML_LOG_LEVEL_ERROR) std::fputs(text, stderr);
      },
      nullptr);
  try {
    llama_backend_init();
    const std::string verb = count > 1 ? words[1] : "";
    if (verb == "quantize" && count == 5) return quantize(words[2], words[3], words[4]);
    if (verb == "serve" && count == 4) return serve(words[2], std::atoi(words[3]));
    std::fputs("usage: peer_bench quantize IN OUT TYPE | serve MODEL THREADS\n", stderr);
    return 2;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "peer_bench: %s\n", error.what());
    return 1;
  }
}
