// SIGINT and SIGTERM finish the step, save, and exit 130 or 143; a second one stops at once.
#pragma once

namespace moelab {

// Installs the handlers; call once, in the program (never in a library user's process).
void catch_signals();

// The signal that asked for a stop, or 0.
int pending_signal();

}  // namespace moelab
