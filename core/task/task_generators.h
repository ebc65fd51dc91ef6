// The families behind task.h. Each draws one problem of the given size; what follows the prompt is a function
// of the prompt alone, so that a greedy run has exactly one right output.
#pragma once

#include <string>

#include "core/task/task_rng.h"

namespace kvlapse {

struct TaskText {
  std::string prompt;   // ends with a newline
  std::string thought;  // without the think tags
  std::string answer;
};

// Running sum modulo 1000 of `size` distinct three-digit numbers.
//   sum:347,120,905?  ->  0+347=347;347+120=467;467+905=372;  ->  372
TaskText generate_sum(TaskRng& rng, int size);

// `size` shuffled assignments (modulo 100) and two names asked for. Names are solved depth first; a name
// solved before is recalled from the chain of thought. After '#' everything is derived a second time.
//   chain:c=a*b;b=7;a=b+5?c,a  ->  c=a*b;a=b+5;b=7;a=7+5=12;b=7;c=12*7=84;a=12;#...  ->  84,12
TaskText generate_chain(TaskRng& rng, int size);

// A loop of instructions over 2 to 4 registers (modulo 100), `size` passes; every register changes in every
// pass and all of them are the answer. The chain of thought counts the passes down.
//   prog 2:a=5,b=17;a+b,b-9?  ->  2:a5+17=22,b17-9=8;1:a22+8=30,b8-9=99;  ->  30,99
TaskText generate_prog(TaskRng& rng, int size);

// The k-th smallest of `size` labelled numbers (k in the prompt), smallest first, remaining list rewritten
// each pass.
//   sort 2:47k,12b,30x?  ->  2:47k 12b 30x|12b;1:47k 30x|30x;  ->  30x
TaskText generate_sort(TaskRng& rng, int size);

// `size` steps over a graph with two edges a node, labelled 0 and 1: "a0c7" leads from a to c and adds 7 to
// the sum (modulo 100). The parity of the sum picks the label.
//   walk 2 from a45:a0c7,c1a2,...?  ->  2:a1c7=52;1:c0b3=55;  ->  b55
TaskText generate_walk(TaskRng& rng, int size);

// The same walk, but a node's label alternates from visit to visit, 0 first: the latest visit must be found
// in the chain of thought, and the older ones are stale.
TaskText generate_rotor(TaskRng& rng, int size);

}  // namespace kvlapse
