#include "tests/support/cli/program.h"

#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <sstream>

namespace kvlapse::test {
namespace {

std::string slurp(const std::string& file) {
  std::ifstream in(file, std::ios::binary);
  std::ostringstream text;
  text << in.rdbuf();
  return text.str();
}

}  // namespace

Outcome run_program(const std::vector<std::string>& arguments) {
  char out_name[] = "/tmp/kvlapse_out_XXXXXX", err_name[] = "/tmp/kvlapse_err_XXXXXX";
  const int out = mkstemp(out_name), err = mkstemp(err_name);
  const pid_t child = fork();
  if (child == 0) {
    dup2(out, STDOUT_FILENO);
    dup2(err, STDERR_FILENO);
    setenv("KVLAPSE_MODELS", KVLAPSE_MODELS, 1);
    std::vector<char*> argv{const_cast<char*>(KVLAPSE_BINARY)};
    for (const std::string& a : arguments) argv.push_back(const_cast<char*>(a.c_str()));
    argv.push_back(nullptr);
    execv(KVLAPSE_BINARY, argv.data());
    _exit(127);
  }
  int status = 0;
  waitpid(child, &status, 0);
  Outcome outcome;
  outcome.exit_code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  outcome.out = slurp(out_name);
  outcome.err = slurp(err_name);
  close(out);
  close(err);
  unlink(out_name);
  unlink(err_name);
  return outcome;
}

}  // namespace kvlapse::test
