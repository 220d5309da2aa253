// Connections made while programs run: whoever runs one accepts, and none waits for another to be made.
#include <cerrno>

#include "mesh.h"

namespace hybridcomm {

bool Mesh::want_link(int rank) {
  const auto found = links_.find(rank);
  if (found != links_.end() && is_whole(rank)) return true;
  if (endpoint(rank) == nullptr) {
    throw Error(Code::invalid, "a program sends to rank " + std::to_string(rank) +
                                   ", which is on no other node of this job");
  }
  if (rank < config_.rank) {
    for (int channel = 0; channel <= config_.data_sockets; ++channel) dial_later(rank, channel);
  }
  return false;
}

void Mesh::want_messages(int rank) {
  dial_later(rank, kMessageControl);
  dial_later(rank, kMessages);
}

void Mesh::dial_later(int rank, int channel) {
  if (asked_.emplace(rank, channel, true).second) {
    dials_.push_back({begin_dial_tcp(*endpoint(rank)), rank, channel});
  }
}

Mesh::Met Mesh::meet() {
  for (size_t i = 0; i < dials_.size();) {
    Dial& dial = dials_[i];
    const Dialled state = dial_state(dial.socket);
    if (state == Dialled::failed) {
      // Its listener is open from before its start to its end.
      throw Error(
          Code::peer_lost,
          errno_text("rank " + std::to_string(dial.rank) + " cannot be reached at " +
                     endpoint(dial.rank)->host + " port " + std::to_string(endpoint(dial.rank)->port)) +
              "; it has closed its context or died, or the network between the nodes is down",
          dial.rank);
    }
    if (state == Dialled::connected) {
      handshakes_.dial(std::move(dial.socket), dial.rank, dial.channel, false);
      dials_.erase(dials_.begin() + static_cast<std::ptrdiff_t>(i));
    } else {
      ++i;
    }
  }
  Met met;
  try {
    for (Connection& connection : handshakes_.progress()) {
      if (connection.channel == kMessages) {
        kept_.emplace(connection.rank, connection.channel, connection.dialled);
        met.messages.push_back(std::move(connection));
      } else {
        met.kept.emplace_back(connection.rank, connection.channel, connection.socket.get());
        keep(std::move(connection));
      }
    }
  } catch (const Error& error) {  // a rank that was dialled closed the connection instead of answering
    throw Error(Code::peer_lost, error.what(), error.rank);
  }
  return met;
}

}  // namespace hybridcomm
