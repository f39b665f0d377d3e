// Builds OpenZeppelin's tree of each [account, amount] list on stdin; prints its root and all proofs.
import { readFileSync } from "node:fs";
import { StandardMerkleTree } from "@openzeppelin/merkle-tree";

const built = JSON.parse(readFileSync(0, "utf8")).map((leaves) => {
  const tree = StandardMerkleTree.of(leaves, ["address", "uint256"]);
  return { root: tree.root, proofs: [...tree.entries()].map(([place]) => tree.getProof(place)) };
});
console.log(JSON.stringify(built));
