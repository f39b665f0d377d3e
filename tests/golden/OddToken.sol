// SPDX-License-Identifier: Apache-2.0
pragma solidity ^0.8.24;

/// A token with every bad habit at hand: no return values, no permit, a fee, a blocklist, a call out on transfer.
contract OddToken {
    mapping(address => uint256) public balanceOf;
    mapping(address => mapping(address => uint256)) public allowance;
    uint256 public feePercent;
    mapping(address => bool) public blocked;
    address public target;
    bytes public message;
    bytes public answer;

    constructor(uint256 supply) {
        balanceOf[msg.sender] = supply;
    }

    function setFee(uint256 percent) external {
        feePercent = percent;
    }

    function setBlocked(address account, bool yes) external {
        blocked[account] = yes;
    }

    function setCall(address to, bytes calldata data) external {
        (target, message) = (to, data);
    }

    function approve(address spender, uint256 amount) external {
        allowance[msg.sender][spender] = amount;
    }

    function transfer(address to, uint256 amount) external {
        _move(msg.sender, to, amount);
    }

    function transferFrom(address from, address to, uint256 amount) external {
        allowance[from][msg.sender] -= amount;
        _move(from, to, amount);
    }

    function _move(address from, address to, uint256 amount) private {
        require(!blocked[to], "blocked");
        balanceOf[from] -= amount;
        balanceOf[to] += amount - (amount * feePercent) / 100;
        if (target != address(0)) {
            (, bytes memory data) = target.call(message);
            answer = data;
        }
    }
}
