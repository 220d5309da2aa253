// Ranks in other processes: a broker (broker.py) behind the Unix socket that HYBRIDCOMM_SIM_BROKER names.
//
// All that it knows are places where so many are wanted: each puts something there, and when all have, all get everything.
// Joining, splitting and every meeting is such a place. Requests are answered at once; who waits asks again.
#pragma once

#include <cstdint>
#include <map>
#include <set>
#include <string>

namespace sim {

// Numbers and texts as bytes, in the order in which they are written.
class Packer {
 public:
  Packer& number(uint64_t value);
  Packer& text(const std::string& value);
  const std::string& bytes() const { return bytes_; }

 private:
  std::string bytes_;
};
class Unpacker {
 public:
  explicit Unpacker(std::string bytes) : bytes_(std::move(bytes)) {}
  uint64_t number();
  std::string text();

 private:
  std::string bytes_;
  size_t at_ = 0;
};

class Broker {
 public:
  // Null: all ranks are threads of this process.
  static Broker* get();
  ~Broker();
  Broker(const Broker&) = delete;
  Broker& operator=(const Broker&) = delete;

  uint32_t process() const { return process_; }
  void put(const std::string& place, size_t wanted, int rank, const std::string& what);
  // Whether all have come to the place, and what they have put there; else who has come, without it.
  bool found(const std::string& place, int rank, std::map<int, std::string>& all);
  void withdraw(const std::string& place, int rank);
  // Of a communicator, ranks of which nothing comes any more.
  void lose(const std::string& clique, int rank);
  std::set<int> lost(const std::string& clique);

 private:
  explicit Broker(const std::string& path);
  Unpacker ask(const Packer& request);

  int socket_;
  uint32_t process_;
  bool gone_ = false;
};

}  // namespace sim
