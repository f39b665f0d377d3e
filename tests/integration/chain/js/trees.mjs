// Builds OpenZeppelin's tree of each [account, amount] list on stdin; prints roots, all proofs, and its milliseconds.
import { readFileSync } from "node:fs";
import { StandardMerkleTree } from "@openzeppelin/merkle-tree";

const built = JSON.parse(readFileSync(0, "utf8")).map((leaves) => {
  const began = performance.now();
  const tree = StandardMerkleTree.of(leaves, ["address", "uint256"]);
  const ms = performance.now() - began;
  return { root: tree.root, proofs: [...tree.entries()].map(([place]) => tree.getProof(place)), ms };
});
console.log(JSON.stringify(built));
