// The micro-GEMM: C [rows, columns] (+)= A [rows, panels * steps] x B, in words.
//
// A   row-major, `lda` words per row; one word is broadcast at a time
// B   `num_panels` panels, each [steps, ldb] words: the reduction goes on from panel to panel, so
//     that a strip's P x V reads and writes its accumulators once
// C   row-major floats, `ldc` per row
// row_scale  with ACCUMULATE: row r of C is multiplied by row_scale[r] before the sum
// bounds   per panel, or null: the keys that any of some rows sees. Q x K^T leaves out other
//         columns (C keeps what it had there), P x V other steps of the reduction
// prefetch   with FETCH: per panel of B, memory that is read soon. Which one that is, is the
// index's
//         choice and no stream that the hardware could see: each step of the product fetches
//         FETCH bytes of it
#pragma once

#include "spec.h"

#include GEMM_HEADER
