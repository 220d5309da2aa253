#include "broker.h"

#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <memory>

#include "world.h"

namespace sim {
namespace {

enum Request : uint64_t { kPut = 1, kFound, kWithdraw, kLose, kLost };

bool send_all(int socket, const std::string& bytes) {
  size_t done = 0;
  while (done < bytes.size()) {
    const ssize_t now = ::send(socket, bytes.data() + done, bytes.size() - done, MSG_NOSIGNAL);
    if (now <= 0) return false;
    done += static_cast<size_t>(now);
  }
  return true;
}

bool receive_all(int socket, std::string& bytes) {
  size_t done = 0;
  while (done < bytes.size()) {
    const ssize_t now = ::recv(socket, bytes.data() + done, bytes.size() - done, 0);
    if (now <= 0) return false;
    done += static_cast<size_t>(now);
  }
  return true;
}

}  // namespace

Packer& Packer::number(uint64_t value) {
  bytes_.append(reinterpret_cast<const char*>(&value), sizeof(value));
  return *this;
}
Packer& Packer::text(const std::string& value) {
  number(value.size());
  bytes_ += value;
  return *this;
}
uint64_t Unpacker::number() {
  uint64_t value = 0;
  if (at_ + sizeof(value) <= bytes_.size()) std::memcpy(&value, bytes_.data() + at_, sizeof(value));
  at_ += sizeof(value);
  return value;
}
std::string Unpacker::text() {
  const auto size = static_cast<size_t>(number());
  const std::string value = at_ <= bytes_.size() ? bytes_.substr(at_, size) : "";
  at_ += size;
  return value;
}

Broker* Broker::get() {
  static const std::unique_ptr<Broker> one = [] {
    const char* path = std::getenv("HYBRIDCOMM_SIM_BROKER");
    return std::unique_ptr<Broker>(path == nullptr || *path == '\0' ? nullptr : new Broker(path));
  }();
  return one.get();
}

Broker::Broker(const std::string& path)
    : socket_(::socket(AF_UNIX, SOCK_STREAM, 0)), process_(static_cast<uint32_t>(::getpid())) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  path.copy(address.sun_path, sizeof(address.sun_path) - 1);
  gone_ = ::connect(socket_, reinterpret_cast<const sockaddr*>(&address), sizeof(address)) != 0;
  if (gone_) world().reports.add(Finding::misuse, "HYBRIDCOMM_SIM_BROKER: nobody listens at " + path);
}

Broker::~Broker() { ::close(socket_); }

Unpacker Broker::ask(const Packer& request) {
  std::string answer;
  if (!gone_) {
    std::string size(sizeof(uint64_t), '\0');
    gone_ = !send_all(socket_, Packer().text(request.bytes()).bytes()) || !receive_all(socket_, size);
    if (!gone_) {
      answer.resize(static_cast<size_t>(Unpacker(size).number()));
      gone_ = !receive_all(socket_, answer);
    }
    if (gone_) world().reports.add(Finding::misuse, "the broker is gone");
  }
  return Unpacker(gone_ ? "" : answer);
}

void Broker::put(const std::string& place, size_t wanted, int rank, const std::string& what) {
  ask(Packer().number(kPut).text(place).number(wanted).number(static_cast<uint64_t>(rank)).text(what));
}

bool Broker::found(const std::string& place, int rank, std::map<int, std::string>& all) {
  Unpacker answer = ask(Packer().number(kFound).text(place).number(static_cast<uint64_t>(rank)));
  const bool complete = answer.number() != 0;
  all.clear();
  for (uint64_t left = answer.number(); left > 0; --left) {
    const int who = static_cast<int>(answer.number());
    all[who] = answer.text();
  }
  return complete;
}

void Broker::withdraw(const std::string& place, int rank) {
  ask(Packer().number(kWithdraw).text(place).number(static_cast<uint64_t>(rank)));
}

void Broker::lose(const std::string& clique, int rank) {
  ask(Packer().number(kLose).text(clique).number(static_cast<uint64_t>(rank)));
}

std::set<int> Broker::lost(const std::string& clique) {
  Unpacker answer = ask(Packer().number(kLost).text(clique));
  std::set<int> ranks;
  for (uint64_t left = answer.number(); left > 0; --left) ranks.insert(static_cast<int>(answer.number()));
  return ranks;
}

}  // namespace sim
