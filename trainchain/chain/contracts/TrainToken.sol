// SPDX-License-Identifier: Apache-2.0
pragma solidity ^0.8.24;

import {ERC20} from "@openzeppelin/contracts/token/ERC20/ERC20.sol";
import {ERC20Permit} from "@openzeppelin/contracts/token/ERC20/extensions/ERC20Permit.sol";

/// @title The token that a TrainChain of one's own pays in.
/// @notice A plain ERC-20 with permit. The whole supply goes to the deployer; nobody can mint, pause or block.
contract TrainToken is ERC20, ERC20Permit {
    /// @param supply All tokens there will ever be, in units of 1e-18.
    constructor(uint256 supply) ERC20("TrainChain", "TRAIN") ERC20Permit("TrainChain") {
        _mint(msg.sender, supply);
    }
}
