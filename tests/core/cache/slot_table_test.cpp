#include "core/cache/slot_table.h"

#include <gtest/gtest.h>

#include "core/base/error.h"

namespace kvlapse {
namespace {

TEST(SlotTable, VacatedSlotIsTakenByTheNextToken) {
  SlotTable table(2, 4);
  for (int p = 0; p < 4; ++p) table.append(Pos{p});
  table.vacate(0, Slot{1});
  table.vacate(1, Slot{3});
  EXPECT_EQ(table.count(0), 3);
  EXPECT_EQ(table.next_slot(0), Slot{1});
  EXPECT_EQ(table.next_slot(1), Slot{3});
  table.append(Pos{4});
  EXPECT_EQ(table.positions(0)[1], Pos{4});
  EXPECT_EQ(table.positions(1)[3], Pos{4});
  EXPECT_THROW(table.append(Pos{5}), Error);
}

TEST(SlotTable, CompactRenumbersInTheGivenOrder) {
  SlotTable table(1, 8);
  for (int p = 0; p < 6; ++p) table.append(Pos{p});
  const Slot order[] = {Slot{4}, Slot{0}, Slot{5}};
  table.compact(0, order);
  ASSERT_EQ(table.count(0), 3);
  EXPECT_EQ(table.positions(0)[0], Pos{4});
  EXPECT_EQ(table.positions(0)[1], Pos{0});
  EXPECT_EQ(table.positions(0)[2], Pos{5});
}

}  // namespace
}  // namespace kvlapse
